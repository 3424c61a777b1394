"""Patches by name: the local store, the Hub, lock files, signatures, and references to them (hf://...)."""

"""Judging a patch: figures and intervals on held-out pairs beside controls, and certificates; training is train's."""

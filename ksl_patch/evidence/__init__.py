"""Judging a patch: figures on held-out pairs beside controls, and certificates of agreement; training is train's."""

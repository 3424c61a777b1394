"""From sentence pairs to a patch: which rows, their tuning, the run folder; judging it is evidence's.

Needs the `train` extra.
"""

"""From sentence pairs to a patch. Needs the `train` extra."""

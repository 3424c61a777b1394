"""Sentence pairs, from the files that hold them to token ids; what a model does with them is train's and evidence's."""

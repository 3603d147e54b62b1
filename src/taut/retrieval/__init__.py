"""Sentence vectors and small indexes of them. Works on tensors and texts; knows no methods and no plans."""

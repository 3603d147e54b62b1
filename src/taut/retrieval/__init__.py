"""Sentence vectors and small indexes of them. Tensors and texts; no method and no plan."""

"""Tensor code that several methods share. It knows nothing of models."""

"""Tensor code that several methods share. It knows no models."""

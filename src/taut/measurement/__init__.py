"""Measures what a model costs: size, time, memory and energy. Knows models and tensors, but no methods or recipes."""

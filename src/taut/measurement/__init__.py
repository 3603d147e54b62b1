"""What a model costs: counted, timed, weighed. Knows models and tensors, nothing of methods or recipes."""

"""Training of language models from a spec, compressed or not."""

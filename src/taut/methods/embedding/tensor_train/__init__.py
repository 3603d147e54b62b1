"""The method ``embedding.tensor_train`` and what it alone needs."""

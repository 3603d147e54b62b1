"""The method ``embedding.tensor_train`` and the code that only it uses."""

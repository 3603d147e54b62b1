"""The method ``embedding.hashed`` and the code that only it uses."""

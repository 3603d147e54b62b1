"""The method ``embedding.mixed_bit`` and the code that only it uses."""

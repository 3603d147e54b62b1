"""The method ``embedding.mixed_bit`` and what it alone needs."""

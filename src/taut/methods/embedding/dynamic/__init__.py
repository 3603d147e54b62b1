"""The method ``embedding.dynamic`` and what it alone needs."""

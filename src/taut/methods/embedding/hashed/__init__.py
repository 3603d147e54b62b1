"""The method ``embedding.hashed`` and what it alone needs."""

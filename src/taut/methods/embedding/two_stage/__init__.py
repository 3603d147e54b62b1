"""The method ``embedding.two_stage`` and what it alone needs."""

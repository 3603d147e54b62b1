"""The method ``linear.low_bit`` and what it alone needs."""

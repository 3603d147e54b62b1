"""The method ``memory.anchor`` and what it alone needs."""

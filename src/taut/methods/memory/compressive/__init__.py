"""The method ``memory.compressive`` and what it alone needs."""

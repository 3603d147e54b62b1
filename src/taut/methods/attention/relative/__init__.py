"""The method ``attention.relative`` and what it alone needs."""

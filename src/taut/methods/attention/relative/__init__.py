"""The method ``attention.relative`` and the code that only it uses."""

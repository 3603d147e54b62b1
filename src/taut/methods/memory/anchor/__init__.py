"""The method ``memory.anchor`` and the code that only it uses."""

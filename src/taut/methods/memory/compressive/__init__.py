"""The method ``memory.compressive`` and the code that only it uses."""

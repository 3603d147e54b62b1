"""The method ``embedding.dynamic`` and the code that only it uses."""

"""The method ``embedding.two_stage`` and the code that only it uses."""

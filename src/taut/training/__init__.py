"""Training with an original at hand: healing what a recipe installed."""

"""Training the parts of a compressed model to answer as the original did."""

"""Plan the compression of a model, apply it, undo it, and keep it in an ordinary checkpoint."""

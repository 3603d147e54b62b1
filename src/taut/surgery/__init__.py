"""Planning a swap, doing it, undoing it, and keeping it in an ordinary checkpoint."""

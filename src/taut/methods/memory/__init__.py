"""Methods for the memory kind: one file each."""

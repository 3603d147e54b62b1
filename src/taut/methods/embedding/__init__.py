"""Methods for the embedding kind: one file each."""

"""Methods for the attention kind: one file each."""

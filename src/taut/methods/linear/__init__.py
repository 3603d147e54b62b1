"""Methods for the linear kind: one file each."""

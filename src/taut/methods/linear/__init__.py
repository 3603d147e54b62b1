"""Methods for linear maps: one file or folder for each."""

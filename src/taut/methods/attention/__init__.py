"""Methods for attention: one file or folder for each."""

"""Methods for the key/value cache: one file or folder for each."""

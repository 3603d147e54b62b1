"""Methods of the kind ``embedding``, one file or folder each."""

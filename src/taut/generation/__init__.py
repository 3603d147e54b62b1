"""Text from a decoder, and what it keeps of a text that many others begin with."""

"""Text generation with a decoder, and the stored key/value cache of a prefix that many texts share."""

"""Caches of keys and values: which tokens they keep, and in how many bits."""

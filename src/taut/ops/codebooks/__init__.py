"""Vectors named by codes: k-means, product codes, searching and gathering."""

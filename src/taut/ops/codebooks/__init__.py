"""Vectors represented by codes: k-means, product codes, search and gathering."""

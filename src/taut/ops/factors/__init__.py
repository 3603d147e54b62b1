"""Matrices as products of smaller ones: decompositions, block products."""

"""Rows of a token table: bands, maps of rows, budgets."""

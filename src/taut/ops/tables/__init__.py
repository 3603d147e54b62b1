"""Rows of a token table: bands of rows, maps from rows to bands, bit budgets."""

"""Studies, their records, and comparisons of them. Files that only count, decide or draw do without torch."""

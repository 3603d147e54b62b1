"""Studies and what follows from their records: numbers only, no torch."""

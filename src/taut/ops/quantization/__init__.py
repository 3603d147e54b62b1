"""Numbers in few bits: formats, rounding, and products with quantised weights."""

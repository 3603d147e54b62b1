"""Draws tables, figures and the report page from the ledger alone, without torch."""

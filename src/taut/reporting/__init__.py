"""Tables, figures and one page, drawn from the ledger alone. No torch."""

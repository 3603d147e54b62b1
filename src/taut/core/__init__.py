"""Basic types: slot, site, cost, recipe, record, registry, environment. Needs neither torch nor the rest of taut."""

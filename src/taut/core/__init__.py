"""The nouns: slot, site, cost, recipe, record, registry, environment. No torch, and nothing else of ours."""

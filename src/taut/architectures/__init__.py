"""Where the slots are in a given model: families (data, not code), a probe for unknown ones, and locate."""

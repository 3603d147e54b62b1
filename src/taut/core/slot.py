"""The five places of a transformer where a part can be exchanged, and the kind of method that fills each."""

KIND_OF_SLOT = {
    "embedding": "embedding",
    "projection": "linear",
    "attention": "attention",
    "feedforward": "linear",
    "memory": "memory",
}
SLOTS = tuple(KIND_OF_SLOT)
KINDS = ("embedding", "linear", "attention", "memory")

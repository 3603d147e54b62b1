"""A bounded cache that keeps the entries with the smallest keys."""

from taut.methods.memory._eviction import EvictionMethod
from taut.ops.caches.eviction import KeyNorm as Norms


class KeyNorm(EvictionMethod):
    """Keeps in each layer and key head the ``entries`` whose keys have the smallest L2 norm, the latest ``recent`` (a
    quarter of them, unless given) in any case. Needs no attention weights, so any kernel may compute attention."""

    id = "memory.key_norm"
    summary = "bounded; every head keeps the entries with the smallest keys"
    source = (
        "Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (2406.11430). "
        "Changed: every layer is compressed, the first ones too; the latest tokens stay in any case; norms "
        "that bfloat16 cannot tell apart are equal, and of equals the later entry stays"
    )

    @property
    def score(self) -> Norms:
        return Norms()

    @property
    def recent(self) -> int:
        return self.knobs.entries // 4 if self.knobs.recent is None else self.knobs.recent

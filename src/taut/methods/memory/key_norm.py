"""A bounded cache that keeps the entries with the smallest keys."""

from taut.methods.memory._eviction import EvictionMethod
from taut.ops.caches.eviction import KeyNorm as Norms


class KeyNorm(EvictionMethod):
    """Each layer and key head keeps the ``entries`` whose keys have the smallest L2 norm.

    The latest ``recent`` are always kept, by default a quarter of ``entries``. No attention weights are needed, so any
    kernel may compute attention.
    """

    id = "memory.key_norm"
    summary = "bounded; every head keeps the entries with the smallest keys"
    source = (
        "Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (2406.11430). "
        "Changed: every layer is compressed, the first ones too; the latest tokens always stay; norms "
        "are compared in bfloat16, and of equal ones the later entry stays"
    )

    @property
    def score(self) -> Norms:
        return Norms()

    @property
    def recent(self) -> int:
        return self.knobs.entries // 4 if self.knobs.recent is None else self.knobs.recent

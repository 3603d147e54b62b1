"""A bounded cache: the open segment and a fixed number of entries from before it."""

from pydantic import Field

from taut.core.site import MemorySite
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.memory.segment_recurrence.mask import Recurrence
from taut.methods.store import CacheStore, Store
from taut.ops.caches.ring import RingCache


class SegmentRecurrenceKnobs(Knobs):
    segment: int = Field(512, ge=1, description="tokens of a segment")
    memory: int = Field(512, ge=0, description="tokens before the segment that all tokens of the segment see")
    store: CacheStore = Field(None, description="how keys and values are stored; default: in their own dtype")


class SegmentRecurrence(MemoryMethod):
    """Text is cut into segments of ``segment`` tokens; each sees itself and the ``memory`` tokens before it.

    A query at i sees the key at j <= i when j >= floor(i / segment) segment - memory. Positions count from the row's
    first real token. A full forward pass uses the same pattern, so decoding step by step equals it. The cache is a ring
    of segment + memory entries; the pattern hides the few that a query may not see. ``memory`` may be longer in use
    than in training: nothing else depends on it.
    """

    id = "memory.segment_recurrence"
    summary = "bounded; the open segment and a fixed memory before it; the reach grows with depth"
    source = (
        "Dai et al. 2019, Transformer-XL (arXiv 1901.02860). Changed: keys and values are cached, not hidden states; "
        "positions are the model's own, not relative ones (attention.relative has those); one pass may read several "
        "segments under the same pattern, and gradients cross the segments within it"
    )
    Knobs = SegmentRecurrenceKnobs
    dial = "memory"
    carried = True
    knobs: SegmentRecurrenceKnobs

    def solve(self, site: MemorySite, keep: float) -> "SegmentRecurrence":
        """Choose the longest memory with which at most ``keep`` of ``site.length`` entries remain.

        Raises TautError when a segment alone is more.
        """
        segment = self.knobs.segment
        problem = f"fewer than a segment of {segment} tokens, which could be shorter"
        return self.within(site, keep, besides=segment, problem=problem)

    def cache(self, layers: int) -> RingCache:
        return RingCache(layers, 0, self.knobs.segment + self.knobs.memory, self.knobs.store)

    @property
    def store(self) -> Store | None:
        return self.knobs.store

    def pattern(self) -> Recurrence:
        return Recurrence(self.knobs.segment, self.knobs.memory)

    def entries(self, site: MemorySite) -> int:
        return min(site.length, self.knobs.segment + self.knobs.memory)

"""A bounded cache whose older entries are compressed, several into one, before they are dropped."""

from typing import Literal

from pydantic import Field

from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.kernels.compressed import CompressedCache, Compression
from taut.methods.method import Knobs, MemoryMethod


class CompressiveKnobs(Knobs):
    segment: int = Field(256, ge=1, description="tokens of a segment; entries are compressed where one ends")
    memory: int = Field(256, ge=0, description="tokens before the segment that are kept as they are")
    compressed: int = Field(256, ge=0, description="compressed entries, each of rate tokens before those")
    rate: int = Field(2, ge=1, description="tokens that become one entry")
    pool: Literal["mean", "max"] = Field("mean", description="what becomes of their keys, and of their values")


class Compressive(MemoryMethod):
    """Tokens are read in segments. Of those before the segment the latest ``memory`` are kept as they are; older ones
    are compressed, ``rate`` into one, and the latest ``compressed`` of these are kept.

    The segment of a query at position i begins at s = floor(i / segment) segment. By then floor(max(0, s - memory) /
    rate) groups of ``rate`` tokens are compressed; the query sees the latest ``compressed`` of these, and every token
    behind them as it is. A compressed entry stands where its last token stood.
    """

    id = "memory.compressive"
    summary = "recent entries, and older ones compressed several into one; bounded"
    source = (
        "Rae et al. 2019, Compressive Transformers (arXiv 1911.05507). Changed: cached keys and values are pooled, not "
        "hidden states, keys with their rotary positions in them; the pooling has nothing to learn"
    )
    Knobs = CompressiveKnobs
    dial = "memory"
    makes_keys = True
    knobs: CompressiveKnobs

    def solve(self, site: MemorySite, keep: float) -> "Compressive":
        """The longest memory for which at most ``keep`` of ``site.length`` entries remain."""
        others = self.pattern().most - self.knobs.memory
        memory = int(keep * site.length + 1e-9) - others
        if memory < 0:
            raise TautError(
                f"{self.id}: keep = {keep} of {site.length} entries is too little for a segment and compressed ones; "
                f"the least keep is {others / site.length:.4f}, or choose smaller segment and compressed"
            )
        return Compressive(self.knobs.model_copy(update={"memory": memory}))

    def cache(self, layers: int) -> CompressedCache:
        return CompressedCache(layers, self.pattern(), self.knobs.pool)

    def pattern(self) -> Compression:
        knobs = self.knobs
        return Compression(knobs.segment, knobs.memory, knobs.compressed, knobs.rate)

    def entries(self, site: MemorySite) -> int:
        return min(site.length, self.pattern().most)

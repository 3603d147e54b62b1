"""A bounded cache whose older entries are compressed, several into one, before they are dropped."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from taut.core.cost import Cost
from taut.core.site import MemorySite, Site
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.memory.compressive.most_used_cache import MASS, UsedCache
from taut.methods.memory.compressive.pooled_cache import CompressedCache
from taut.methods.store import CacheStore, Store
from taut.ops.caches.pooling import REDUCTIONS, Compressor, numbers, products
from taut.ops.caches.queues import Compression, QueueCache


class CompressiveKnobs(Knobs):
    segment: int = Field(256, ge=1, description="tokens of a segment; entries are compressed at its end")
    memory: int = Field(256, ge=0, description="tokens before the segment that are kept uncompressed")
    compressed: int = Field(256, ge=0, description="compressed entries kept, each made from rate tokens before those")
    rate: int = Field(2, ge=1, description="tokens that become one entry")
    pool: Literal["mean", "max", "conv", "dilated", "most_used"] = Field(
        "mean",
        description="how the keys and the values of a group become one: their mean or maximum; a learned convolution "
        "(conv) or learned dilated ones; most_used: each head keeps the entry that received the most attention",
    )
    store: CacheStore = Field(None, description="how keys and values are stored; default: in their own dtype")

    @model_validator(mode="after")
    def _something_to_convolve(self) -> Self:
        if self.pool == "dilated" and self.rate == 1:
            raise ValueError("pool = 'dilated' needs rate >= 2: a group of one token has no distances")
        return self


class Compressive(MemoryMethod):
    """Keeps the open segment, the latest tokens before it, and older tokens compressed several into one.

    Of the tokens before the segment, the latest ``memory`` are kept uncompressed. Older ones are compressed, ``rate``
    into one, and the latest ``compressed`` of these entries are kept.

    The segment of a query at position i begins at s = floor(i / segment) segment. By then floor(max(0, s - memory) /
    rate) groups of ``rate`` tokens are compressed. The query sees the latest ``compressed`` of these groups, and every
    token after them uncompressed. A compressed entry has the position of its last token.

    With ``most_used`` this holds only between passes: attention is known only after a pass. Within a pass, queries see
    all entries kept before it, and the tokens of the pass up to themselves.
    """

    id = "memory.compressive"
    summary = "bounded; recent entries, and older ones compressed several into one"
    source = (
        "Rae et al. 2019, Compressive Transformers (arXiv 1911.05507). Changed: cached keys and values are compressed, "
        "not hidden states, and keys after their rotary positions are applied; learned pools start as the mean, and "
        "each key head has maps of its own; dilated convolutions, which the paper does not specify, have two taps at "
        "distances 1, 2, 4, ... and end at the group's first token; the most used entry is chosen in each group, not "
        "among all entries that leave; one optimizer for everything"
    )
    Knobs = CompressiveKnobs
    dial = "memory"
    carried = True
    knobs: CompressiveKnobs

    @property
    def makes_keys(self) -> bool:
        return self.knobs.pool != "most_used"

    @property
    def unequal(self) -> str | None:
        if self.knobs.pool != "most_used":
            return None
        return "what is used most depends on where the text was cut, and a pass without a cache compresses nothing"

    @property
    def reconstructs(self) -> bool:
        return self.knobs.pool in REDUCTIONS

    @property
    def store(self) -> Store | None:
        return self.knobs.store

    @property
    def compression(self) -> Compression:
        knobs = self.knobs
        return Compression(knobs.segment, knobs.memory, knobs.compressed, knobs.rate)

    def fits(self, site: Site) -> str | None:
        if (reason := super().fits(site)) is not None:
            return reason
        if self.knobs.pool == "most_used" and site.position == "bias":
            return "the model biases scores by distance, but attention to entries would be counted without that bias"
        return None

    def solve(self, site: MemorySite, keep: float) -> "Compressive":
        """Choose the longest memory with which at most ``keep`` of ``site.length`` entries remain.

        Raises TautError when a segment and the compressed entries are already more.
        """
        problem = "too few for a segment and the compressed entries, which could be smaller"
        return self.within(site, keep, besides=self.compression.most - self.knobs.memory, problem=problem)

    def predict(self, site: MemorySite) -> Cost:
        """Count the entries and what is learned and computed for them; with ``most_used``, one score for each entry."""
        cost, knobs = super().predict(site), self.knobs
        if knobs.pool == "most_used":
            scores = site.layers * site.key_heads * MASS.dtype.itemsize
            return cost + Cost(cache_bytes_per_token=scores * self.entries(site) / site.length)
        if knobs.pool not in REDUCTIONS:
            return cost
        shape = knobs.pool, site.key_heads, knobs.rate, site.head_width
        parameters = site.layers * numbers(*shape)
        flops = 2.0 * site.layers * products(*shape) / knobs.rate
        return cost + Cost(parameters, parameters * site.width_in_bytes, flops)

    def learned(self, site: MemorySite, device: torch.device, dtype: torch.dtype) -> Compressor | None:
        knobs = self.knobs
        if knobs.pool not in REDUCTIONS:
            return None
        return Compressor(knobs.pool, site.layers, site.key_heads, knobs.rate, site.head_width, device, dtype)

    def cache(self, layers: int) -> QueueCache:
        if self.knobs.pool == "most_used":
            return UsedCache(layers, self.compression, self.knobs.store)
        return CompressedCache(layers, self.compression, self.knobs.pool, self.knobs.store)

    def pattern(self) -> Compression | None:
        """Return the pattern of the entries above; None with ``most_used``, where it depends on the passes."""
        return None if self.knobs.pool == "most_used" else self.compression

    def entries(self, site: MemorySite) -> int:
        return min(site.length, self.compression.most)

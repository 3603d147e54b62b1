"""The base of training-free evictions: bounded caches in which each head drops the entries with the least scores."""

from abc import abstractmethod
from typing import Self

from pydantic import Field, model_validator

from taut.core.cost import Cost
from taut.core.site import MemorySite, Site
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.store import CacheStore, Store
from taut.ops.caches.eviction import EvictionCache, Score


class EvictionKnobs(Knobs):
    entries: int = Field(1024, ge=1, description="entries kept in each layer and key head, the recent ones included")
    recent: int | None = Field(
        None, ge=0, description="latest tokens that are never dropped; default: a share of entries that the method sets"
    )
    store: CacheStore = Field(None, description="how keys and values are stored; default: in their own dtype")

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.recent is not None and self.recent > self.entries:
            raise ValueError(f"recent = {self.recent} is more than the {self.entries} entries kept")
        return self


class EvictionMethod(MemoryMethod):
    """Abstract: after each forward pass, every key head of every layer drops the entries with the least ``score`` until
    ``entries`` are left.

    A pass without a cache drops nothing: there is no state to bound, and what a head keeps depends on how the text was
    cut into pieces. Within a pass, new tokens see each other causally, and all entries kept before the pass.
    """

    Knobs = EvictionKnobs
    dial = "entries"
    unequal = "what is dropped depends on where the text was cut, and a pass without a cache drops nothing"
    knobs: EvictionKnobs

    @property
    @abstractmethod
    def score(self) -> Score:
        """How entries are scored."""

    @property
    @abstractmethod
    def recent(self) -> int:
        """How many of the latest tokens are never dropped."""

    def fits(self, site: Site) -> str | None:
        if (reason := super().fits(site)) is not None:
            return reason
        if site.position == "bias":
            return "the model biases scores by distance, but heads would keep entries at different distances"
        if site.window:
            return f"layers of the model see a window of {site.window}, but heads would keep entries from beyond it"
        return None

    def solve(self, site: MemorySite, keep: float) -> Self:
        """Keep at most ``keep`` of ``site.length`` entries. Raises TautError when the recent tokens alone are more."""
        least = max(1, self.knobs.recent or 0)
        return self.within(site, keep, least=least, problem=f"{least} must stay")

    def predict(self, site: MemorySite) -> Cost:
        """Count the entries and their scores: one score for each entry of each key head."""
        scores = site.layers * site.key_heads * self.score.dtype.itemsize
        return Cost(cache_bytes_per_token=(self.entry_bytes(site) + scores) * self.entries(site) / site.length)

    @property
    def store(self) -> Store | None:
        return self.knobs.store

    def cache(self, layers: int) -> EvictionCache:
        return EvictionCache(layers, self.knobs.entries, self.recent, self.score, self.knobs.store)

    def pattern(self) -> None:
        """Return None: a pass without a cache drops nothing."""

    def entries(self, site: MemorySite) -> int:
        return min(site.length, self.knobs.entries)

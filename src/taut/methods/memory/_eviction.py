"""What training-free evictions have in common: bounded, each head for itself, whatever they score entries by."""

from abc import abstractmethod
from typing import Self

from pydantic import Field, model_validator

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import MemorySite, Site
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.store import CacheStore, Store
from taut.ops.caches.eviction import EvictionCache, Score


class EvictionKnobs(Knobs):
    entries: int = Field(1024, ge=1, description="entries held in each layer and key head, the recent ones included")
    recent: int | None = Field(None, ge=0, description="latest tokens that are never dropped; none: the method's share")
    store: CacheStore = Field(None, description="how keys and values are kept; none: as they come")

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.recent is not None and self.recent > self.entries:
            raise ValueError(f"recent = {self.recent} is more than the {self.entries} entries held")
        return self


class EvictionMethod(MemoryMethod):
    """Abstract: after each pass that leaves more than ``entries``, every key head of every layer drops those of the
    least ``score``.

    A pass without a cache drops nothing: there is no state to bound, and what a head keeps depends on how the text came
    in pieces. Within a pass, new tokens see each other causally, and all that was held before it.
    """

    Knobs = EvictionKnobs
    dial = "entries"
    unequal = "what is dropped depends on where the text was cut, and a pass without a cache drops nothing"
    knobs: EvictionKnobs

    @property
    @abstractmethod
    def score(self) -> Score:
        """What entries are worth."""

    @property
    @abstractmethod
    def recent(self) -> int:
        """How many of the latest tokens are never dropped."""

    def fits(self, site: Site) -> str | None:
        if (reason := super().fits(site)) is not None:
            return reason
        if site.position == "bias":
            return "the model biases scores by distance, and every head would hold entries at other distances"
        if site.window:
            return f"layers of the model see a window of {site.window}, and heads would hold entries from beyond it"
        return None

    def solve(self, site: MemorySite, keep: float) -> Self:
        """At most ``keep`` of ``site.length`` entries. Raises TautError where recent tokens alone are more."""
        entries = int(keep * site.length + 1e-9)
        least = max(1, self.knobs.recent or 0)
        if entries < least:
            raise TautError(
                f"{self.id}: keep = {keep} of {site.length} entries is {entries}, and {least} must stay; the least "
                f"keep is {least / site.length:.4f}"
            )
        return type(self)(self.knobs.model_copy(update={"entries": entries}))

    def predict(self, site: MemorySite) -> Cost:
        """Scores are held beside the entries: one for each key head."""
        scores = site.layers * site.key_heads * self.score.dtype.itemsize
        return Cost(cache_bytes_per_token=(self.entry_bytes(site) + scores) * self.entries(site) / site.length)

    @property
    def store(self) -> Store | None:
        return self.knobs.store

    def cache(self, layers: int) -> EvictionCache:
        return EvictionCache(layers, self.knobs.entries, self.recent, self.score, self.knobs.store)

    def pattern(self) -> None:
        """None: see above."""

    def entries(self, site: MemorySite) -> int:
        return min(site.length, self.knobs.entries)

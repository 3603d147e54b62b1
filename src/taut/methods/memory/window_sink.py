"""A bounded cache: the first tokens and a sliding window."""

from pydantic import Field

from taut.core.site import MemorySite
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.store import CacheStore, Store
from taut.ops.attention.masks import Sink
from taut.ops.caches.ring import RingCache


class WindowSinkKnobs(Knobs):
    sinks: int = Field(4, ge=0, description="first tokens that are never dropped")
    window: int = Field(1024, ge=1, description="latest tokens that are kept, the current one included")
    store: CacheStore = Field(None, description="how keys and values are stored; default: in their own dtype")


class WindowSink(MemoryMethod):
    """Keeps the keys and values of the first ``sinks`` tokens of each row and of its latest ``window``.

    A query at i sees the key at j <= i when j < sinks or i - j < window. Positions count from the row's first real
    token. A full forward pass uses the same pattern, so decoding step by step equals it.
    """

    id = "memory.window_sink"
    summary = "bounded; the first tokens and a sliding window"
    source = (
        "Xiao et al. 2023 (2309.17453), StreamingLLM. Changed: tokens keep their true positions instead of their "
        "places in the cache, and a long prompt is read under the same pattern"
    )
    Knobs = WindowSinkKnobs
    dial = "window"
    carried = True
    knobs: WindowSinkKnobs

    def solve(self, site: MemorySite, keep: float) -> "WindowSink":
        """Choose the largest window with which at most ``keep`` of ``site.length`` entries remain.

        Raises TautError when the sinks leave no window.
        """
        sinks = self.knobs.sinks
        return self.within(site, keep, besides=sinks, least=1, problem=f"no window is left after {sinks} sinks")

    def cache(self, layers: int) -> RingCache:
        return RingCache(layers, self.knobs.sinks, self.knobs.window, self.knobs.store)

    @property
    def store(self) -> Store | None:
        return self.knobs.store

    def pattern(self) -> Sink:
        return Sink(self.knobs.sinks, self.knobs.window)

    def entries(self, site: MemorySite) -> int:
        return min(site.length, self.knobs.sinks + self.knobs.window)

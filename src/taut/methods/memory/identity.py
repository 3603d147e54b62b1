"""The original cache: everything, for ever."""

from taut.core.cost import Cost
from taut.core.site import MemorySite, Site
from taut.methods.base import MemoryMethod


class Identity(MemoryMethod):
    """Nothing is exchanged: the model keeps whatever cache it would have used."""

    id = "memory.identity"
    summary = "the original cache, unchanged"
    source = "none: the control"

    def fits(self, site: Site) -> str | None:
        return None if isinstance(site, MemorySite) else "not a cache"

    def predict(self, site: MemorySite) -> Cost:
        return site.dense()

    def cache(self, layers: int) -> None:
        """None: the model's own."""

    def pattern(self) -> None:
        """None: everybody sees everybody."""

    def entries(self, site: MemorySite) -> int:
        return site.length

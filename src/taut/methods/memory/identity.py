"""The original cache, unchanged."""

from taut.core.cost import Cost
from taut.core.site import MemorySite, Site
from taut.methods.base import MemoryMethod


class Identity(MemoryMethod):
    """Changes nothing: the model keeps the cache it would have used."""

    id = "memory.identity"
    summary = "the original cache, unchanged"
    source = "none: the control"

    def fits(self, site: Site) -> str | None:
        return None if isinstance(site, MemorySite) else "not a cache"

    def predict(self, site: MemorySite) -> Cost:
        return site.dense()

    def cache(self, layers: int) -> None:
        """Return None: the model uses its own cache."""

    def pattern(self) -> None:
        """Return None: all entries stay visible."""

    def entries(self, site: MemorySite) -> int:
        return site.length

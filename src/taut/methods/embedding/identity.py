"""The original token table, unchanged: the control of every comparison."""

from taut.core.cost import Cost
from taut.core.site import Site
from taut.methods.base import Method


class IdentityEmbedding(Method):
    """Changes nothing, so that a study measures its noise."""

    id = "embedding.identity"
    summary = "leaves the table unchanged, to measure the noise of a comparison"
    source = "none: the control of every study"

    def fits(self, site: Site) -> str | None:
        return None

    def predict(self, site: Site) -> Cost:
        return site.dense()

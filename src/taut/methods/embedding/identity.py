"""The token table left as it is: the error bar of every comparison."""

from taut.core.cost import Cost
from taut.core.site import Site
from taut.methods.base import Method


class IdentityEmbedding(Method):
    """Changes nothing; what a study measures on it is noise."""

    id = "embedding.identity"
    summary = "leaves the table in place, as the error bar of a comparison"
    source = "none: the control of every study"

    def fits(self, site: Site) -> str | None:
        return None

    def predict(self, site: Site) -> Cost:
        return site.dense()

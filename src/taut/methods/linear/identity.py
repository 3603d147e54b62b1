"""The unchanged linear map: its differences from the original are the error bar of a comparison."""

from taut.core.cost import Cost
from taut.core.site import Site
from taut.methods.base import Method


class IdentityLinear(Method):
    """Changes nothing. Any difference a study measures here is noise."""

    id = "linear.identity"
    summary = "leaves the map unchanged; shows the noise of a comparison"
    source = "none: the control of every study"

    def fits(self, site: Site) -> str | None:
        return None

    def predict(self, site: Site) -> Cost:
        return site.dense()

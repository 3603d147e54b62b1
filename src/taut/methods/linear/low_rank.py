"""The product of two thin maps: W ~ U V, with U (outputs, R) and V (R, inputs)."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import LinearSite
from taut.methods.base import Calibration, Knobs, LinearMethod
from taut.methods.part import LinearPart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.svd import DAMPING, balanced_factors, balanced_factors_for

STANDARD_DEVIATION = 0.02
"""For training from scratch: a part starts as the best approximation of a random dense weight with this standard
deviation."""
ALIGNMENT = 8
"""A rank derived from ``keep`` is a multiple of this once it is at least 16 times this: matrix kernels are about 10 %
faster then."""


class LowRankKnobs(Knobs):
    rank: int | None = Field(
        None, ge=1, description="R, the inner width, below both sides of the map; give this or keep"
    )
    activation_aware: bool = Field(
        True,
        description="minimise the error on calibration inputs, if there are any, instead of the error of the weight",
    )
    store: Store | None = Field(None, description="store both factors in fewer bits: smaller, but slower")


class LowRankLinearPart(LinearPart):
    """y = U (V x) + b. ``weight`` is U transposed (R, outputs), ``projection`` is V (R, inputs).

    Both are stored with their long side contiguous. For a single token, a product with U stored as rows of R numbers
    reads memory at half the speed.
    """

    may_keep_dense_copy = True

    def __init__(
        self, site: LinearSite, rank: int, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, device, dtype)
        self.hold("weight", (rank, site.outputs), store, device)
        self.hold("projection", (rank, site.inputs), store, device)

    def set_factors(self, outer: Tensor, inner: Tensor) -> None:
        """Store U (outputs, R) and V (R, inputs), in any floating dtype."""
        self.fill("weight", outer.T)
        self.fill("projection", inner)

    def product(self, x: Tensor) -> Tensor:
        """Apply the map, bias included: (..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(x, self.held("projection")), self.held("weight").T, self.bias)

    def merged(self) -> Tensor:
        """Return U V, (outputs, inputs)."""
        return self.held("weight").T @ self.held("projection")


class LowRankLinear(LinearMethod):
    """Balanced truncated SVD.

    ``keep`` counts parameters, whatever number of bytes ``store`` keeps them in. The bias counts in the part and in the
    dense map.
    """

    id = "linear.low_rank"
    summary = "the product of two thin maps; balanced truncated SVD, weighted by the inputs when calibrated"
    source = (
        "Wei et al. 2024, Building on Efficient Foundations: Effective Training of LLMs with Structured Feedforward "
        "Layers (arXiv 2406.16450): factors and start; Wang et al. 2024, SVD-LLM (arXiv 2403.07378): the "
        "activation-aware fit. Changed: the fit needs no Cholesky factor, so the Gram matrix may be singular"
    )
    Knobs = LowRankKnobs
    dial = "rank"
    spares_first_layer = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"} if self.knobs.activation_aware else ())

    @property
    def rank(self) -> int:
        if self.knobs.rank is None:
            raise TautError(f"{self.id}: give keep or rank")
        return self.knobs.rank

    def fits(self, site: LinearSite) -> str | None:
        limit = min(site.inputs, site.outputs)
        if self.rank < limit:
            return None
        return f"rank {self.rank} is no reduction of {site.outputs} x {site.inputs}: it must be below {limit}"

    def solve(self, site: LinearSite, keep: float) -> "LowRankLinear":
        """Choose the rank: R = floor((keep (M N + b) - b) / (M + N)), with b = M when there is a bias, else 0.

        From 128 on, R is rounded down to a multiple of 8. Raises TautError when ``keep`` leaves no rank.
        """
        bias = site.outputs if site.bias else 0
        dense, sides = site.dense().parameters, site.inputs + site.outputs
        rank = int((keep * dense - bias) // sides)
        if rank < 1:
            raise TautError(
                f"{self.id}: keep = {keep} leaves no rank at {site.name} ({site.outputs} x {site.inputs}): "
                f"the least is {(sides + bias) / dense:.2g}"
            )
        if rank >= 16 * ALIGNMENT:
            rank -= rank % ALIGNMENT
        return type(self)(self.knobs.model_copy(update={"rank": rank}))

    def predict(self, site: LinearSite) -> Cost:
        factors, bias = self.rank * (site.inputs + site.outputs), site.outputs if site.bias else 0
        shapes, width = ((self.rank, site.outputs), (self.rank, site.inputs)), site.width_in_bytes
        stored = sum(stored_bytes(shape, self.knobs.store, width) for shape in shapes)
        return Cost(factors + bias, stored + bias * width, 2.0 * factors)

    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> LowRankLinearPart:
        part = LowRankLinearPart(site, self.rank, self.knobs.store, device, dtype)
        if device.type != "meta":
            start = torch.randn(site.outputs, site.inputs, device=device) * STANDARD_DEVIATION
            part.set_factors(*balanced_factors(start, self.rank))
        return part

    @torch.no_grad()
    def fit(self, part: LowRankLinearPart, weight: Tensor, calibration: Calibration) -> None:
        """Fit the map on the calibration inputs. Without ``calibration.gram``, or with ``activation_aware`` off, the
        result is the best approximation of the weight."""
        if self.knobs.activation_aware and calibration.gram is not None:
            part.set_factors(*balanced_factors_for(weight, calibration.gram, self.rank, DAMPING))
        else:
            part.set_factors(*balanced_factors(weight, self.rank))

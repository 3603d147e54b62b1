"""A linear map as the product of two thin ones: W ~ U V, with U (outputs, R) and V (R, inputs)."""

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
"""Of the dense weight whose best approximation a part trained from scratch starts as."""
ALIGNMENT = 8
"""From 16 times this on, a rank derived from ``keep`` is a multiple of it: matrix kernels are some 10 % faster."""


class LowRankKnobs(Knobs):
    rank: int | None = Field(None, ge=1, description="R, the inner width; below both sides of the map; or give keep")
    activation_aware: bool = Field(
        True, description="minimise the error on calibration inputs where there are any, not that of the weight"
    )
    store: Store | None = Field(None, description="keep both factors in fewer bits; smaller, and slower")


class LowRankLinearPart(LinearPart):
    """y = U (V x) + b. ``weight`` is U transposed (R, outputs), ``projection`` is V (R, inputs).

    Both are stored with their long side contiguous: for one token a product with U stored row by row, R numbers at
    a time, reads memory at half the speed.
    """

    may_keep_dense_copy = True

    def __init__(
        self, site: LinearSite, rank: int, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, device, dtype)
        self.hold("weight", (rank, site.outputs), store, device)
        self.hold("projection", (rank, site.inputs), store, device)

    def set_factors(self, outer: Tensor, inner: Tensor) -> None:
        """Take U (outputs, R) and V (R, inputs), in any floating dtype."""
        self.fill("weight", outer.T)
        self.fill("projection", inner)

    def product(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(x, self.held("projection")), self.held("weight").T, self.bias)

    def merged(self) -> Tensor:
        """U V, (outputs, inputs)."""
        return self.held("weight").T @ self.held("projection")


class LowRankLinear(LinearMethod):
    """Balanced truncated SVD. ``keep`` counts parameters, the bias included on both sides of the comparison, whatever
    ``store`` makes of their bytes."""

    id = "linear.low_rank"
    summary = "the product of two thin maps; balanced truncated SVD, aware of the inputs when calibrated"
    source = (
        "Wei et al. 2024, Building on Efficient Foundations: Effective Training of LLMs with Structured Feedforward "
        "Layers (arXiv 2406.16450): factors and start; Wang et al. 2024, SVD-LLM (arXiv 2403.07378): the "
        "activation-aware fit. Changed: the fit needs no Cholesky factor, so a singular Gram matrix is no obstacle"
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
        """R = floor((keep (M N + b) - b) / (M + N)), with b = M when there is a bias, else 0; from 128 on rounded
        down to a multiple of 8."""
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
        """Without ``calibration.gram``, or with ``activation_aware`` off, the best approximation of the weight."""
        if self.knobs.activation_aware and calibration.gram is not None:
            part.set_factors(*balanced_factors_for(weight, calibration.gram, self.rank, DAMPING))
        else:
            part.set_factors(*balanced_factors(weight, self.rank))

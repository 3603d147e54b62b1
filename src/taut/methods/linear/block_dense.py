"""A block-diagonal map followed by a dense one: W ~ U blockdiag(V), with U (outputs, R) and V (B, R/B, inputs/B)."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import LinearSite
from taut.methods.base import Calibration, Knobs, LinearMethod
from taut.methods.part import LinearPart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.block_fit import block_factors, block_factors_for
from taut.ops.factors.block_matmul import block_product
from taut.ops.factors.svd import DAMPING

ALIGNMENT = 8
"""A block's rank derived from ``keep`` is a multiple of this once it is at least 16 times this: matrix kernels are
faster then."""


class BlockDenseKnobs(Knobs):
    blocks: int = Field(2, ge=1, description="B, the number of blocks, a divisor of the inputs; the paper uses 2 or 4")
    rank: int | None = Field(None, ge=1, description="R, the inner width, a multiple of B; give this or keep")
    activation_aware: bool = Field(
        True,
        description="minimise the error on calibration inputs, if there are any, instead of the error of the weight",
    )
    store: Store | None = Field(None, description="store both factors in fewer bits: smaller, but slower")


class BlockDensePart(LinearPart):
    """y = U (blockdiag(V) x) + b. ``weight`` is U transposed (R, outputs), ``projection`` is V (B, R/B, inputs/B).

    Both are stored with their long side contiguous: for a single token they are read fastest that way.
    """

    may_keep_dense_copy = True

    def __init__(
        self, site: LinearSite, blocks: int, rank: int, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, device, dtype)
        self.hold("weight", (rank, site.outputs), store, device)
        self.hold("projection", (blocks, rank // blocks, site.inputs // blocks), store, device)

    def product(self, x: Tensor) -> Tensor:
        """Apply the map, bias included: (..., inputs) -> (..., outputs)."""
        hidden = block_product(x.reshape(-1, self.in_features), self.held("projection").transpose(1, 2))
        return F.linear(hidden, self.held("weight").T, self.bias).view(*x.shape[:-1], self.out_features)

    def merged(self) -> Tensor:
        """Return U blockdiag(V), (outputs, inputs)."""
        return self.held("weight").T @ torch.block_diag(*self.held("projection"))


class BlockDenseLinear(LinearMethod):
    """``keep`` counts parameters, whatever number of bytes ``store`` keeps them in. The bias counts in the part and in
    the dense map."""

    id = "linear.block_dense"
    summary = (
        "a block-diagonal map and a dense one; truncated SVD of each block, weighted by the inputs when calibrated"
    )
    source = (
        "Wei et al. 2024, Building on Efficient Foundations: Effective Training of LLMs with Structured Feedforward "
        "Layers (arXiv 2406.16450): factors and orthonormal start. Changed: trained weights are converted, one block "
        "after another in turns (reduced-rank regression); keep sets a rank for each map, not one for both maps of "
        "a feed-forward block"
    )
    Knobs = BlockDenseKnobs
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
        if (reason := self._blocks_fit(site)) is not None:
            return reason
        if self.rank % self.knobs.blocks:
            lower = self.rank - self.rank % self.knobs.blocks
            near = f"{lower} or {lower + self.knobs.blocks}" if lower else f"{self.knobs.blocks}"
            return f"rank {self.rank} is not a multiple of the {self.knobs.blocks} blocks: try {near}"
        limit = site.outputs * site.inputs // self._factors(1, site)
        if self.rank <= limit:
            return None
        return f"rank {self.rank} is no reduction of {site.outputs} x {site.inputs}: it must be at most {limit}"

    def solve(self, site: LinearSite, keep: float) -> "BlockDenseLinear":
        """Choose the rank: R / B = floor((keep (M N + b) - b) / (N + B M)), with b = M when there is a bias, else 0.

        From 128 on, R / B is rounded down to a multiple of 8. Raises TautError when ``keep`` leaves no rank, or when
        the blocks do not divide the inputs.
        """
        if (reason := self._blocks_fit(site)) is not None:
            raise TautError(reason)
        bias = site.outputs if site.bias else 0
        dense, blocks = site.dense().parameters, self.knobs.blocks
        # A rank of one more in every block costs a row of V in each block, and a column of U for each block.
        rank_parameters = self._factors(blocks, site)
        share = int((keep * dense - bias) // rank_parameters)
        if share < 1:
            raise TautError(
                f"{self.id}: keep = {keep} leaves no rank at {site.name} ({site.outputs} x {site.inputs}): "
                f"the least is {(rank_parameters + bias) / dense:.2g}"
            )
        if share >= 16 * ALIGNMENT:
            share -= share % ALIGNMENT
        return type(self)(self.knobs.model_copy(update={"rank": share * blocks}))

    def predict(self, site: LinearSite) -> Cost:
        factors, bias = self._factors(self.rank, site), site.outputs if site.bias else 0
        blocks, width = self.knobs.blocks, site.width_in_bytes
        shapes = (self.rank, site.outputs), (blocks, self.rank // blocks, site.inputs // blocks)
        stored = sum(stored_bytes(shape, self.knobs.store, width) for shape in shapes)
        return Cost(factors + bias, stored + bias * width, 2.0 * factors)

    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> BlockDensePart:
        part = BlockDensePart(site, self.knobs.blocks, self.rank, self.knobs.store, device, dtype)
        if device.type != "meta":
            # Orthonormal, as in the paper, which takes the polar factor of a Gaussian matrix: the same distribution.
            outer = nn.init.orthogonal_(torch.empty(self.rank, site.outputs, device=device))
            shape = self.rank // self.knobs.blocks, site.inputs // self.knobs.blocks
            inner = [nn.init.orthogonal_(torch.empty(shape, device=device)) for _ in range(self.knobs.blocks)]
            part.fill("weight", outer)
            part.fill("projection", torch.stack(inner))
        return part

    @torch.no_grad()
    def fit(self, part: BlockDensePart, weight: Tensor, calibration: Calibration) -> None:
        """Fit the map on the calibration inputs. Without ``calibration.gram``, or with ``activation_aware`` off, the
        result is the best approximation of the weight."""
        ranks = [self.rank // self.knobs.blocks] * self.knobs.blocks
        if self.knobs.activation_aware and calibration.gram is not None:
            factors = block_factors_for(weight, calibration.gram, ranks, DAMPING)
        else:
            factors = block_factors(weight, ranks)
        part.fill("weight", torch.cat([outer for outer, _ in factors], dim=1).T)
        part.fill("projection", torch.stack([inner for _, inner in factors]))

    def _blocks_fit(self, site: LinearSite) -> str | None:
        if site.inputs % self.knobs.blocks == 0:
            return None
        possible = ", ".join(str(count) for count in range(2, 17) if site.inputs % count == 0)
        return f"{self.knobs.blocks} blocks do not divide the {site.inputs} inputs: try {possible or 'low_rank'}"

    def _factors(self, rank: int, site: LinearSite) -> int:
        """Count the parameters of both factors: R (N / B + M)."""
        return rank * (site.inputs // self.knobs.blocks + site.outputs)

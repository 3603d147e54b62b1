"""Two block-diagonal maps with a shuffle after each: W ~ P_out blockdiag(b2) P_mid blockdiag(b1)."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import LinearSite
from taut.methods.base import Calibration, Knobs, LinearMethod
from taut.methods.part import LinearPart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.block_fit import shuffled_factors
from taut.ops.factors.block_matmul import block_product
from taut.ops.factors.svd import DAMPING


class BlockShuffleKnobs(Knobs):
    blocks: int | None = Field(
        None, ge=1, description="B, a divisor of both sides; B squared is at most the shorter side; give this or keep"
    )
    activation_aware: bool = Field(
        True,
        description="minimise the error on calibration inputs, if there are any, instead of the error of the weight",
    )
    store: Store | None = Field(None, description="store both factors in fewer bits: smaller, but slower")


class BlockShufflePart(LinearPart):
    """Two block-diagonal maps with K = min(inputs, outputs) hidden numbers between them.

    ``projection`` (B, inputs/B, K/B): its block k reads the k-th run of inputs and computes hidden t = k K/B + q.
    ``weight`` (B, K/B, outputs/B): its block t mod B reads hidden t, and its number s is output s B + (t mod B). They
    are b1 and b2 of the paper, both transposed: for a single token they are read fastest that way.

    In a feed-forward block the result of a widening map keeps the layout it was computed in, feature by feature. The
    operations that follow are elementwise.
    """

    may_keep_dense_copy = True

    def __init__(
        self, site: LinearSite, blocks: int, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, device, dtype)
        inner, outer = _shapes(site, blocks)
        self.hold("weight", outer, store, device)
        self.hold("projection", inner, store, device)
        self.feature_major = site.slot == "feedforward" and site.outputs > site.inputs

    def product(self, x: Tensor) -> Tensor:
        """Apply the map, bias included: (..., inputs) -> (..., outputs)."""
        hidden = block_product(x.reshape(-1, self.in_features), self.held("projection"), feature_major=True)
        y = block_product(hidden, self.held("weight"), self.bias, interleaved=True, feature_major=self.feature_major)
        return y.view(*x.shape[:-1], self.out_features)

    def merged(self) -> Tensor:
        """Return the dense weight (outputs, inputs), both shuffles included."""
        outer = self.held("weight")
        hidden = torch.block_diag(*self.held("projection").transpose(1, 2))
        shares = hidden.unflatten(0, (-1, len(outer))).transpose(0, 1)
        return torch.bmm(outer.transpose(1, 2), shares).transpose(0, 1).flatten(0, 1)


class BlockShuffleLinear(LinearMethod):
    """``keep`` counts parameters, whatever number of bytes ``store`` keeps them in. The bias counts in the part and in
    the dense map. The dial is coarse: the number of blocks
    must divide both sides."""

    id = "linear.block_shuffle"
    summary = (
        "two block-diagonal maps with a shuffle between (Monarch); truncated SVD of each block, weighted by the inputs"
    )
    source = (
        "Wei et al. 2024, Building on Efficient Foundations: Effective Training of LLMs with Structured Feedforward "
        "Layers (arXiv 2406.16450): factors, shuffles and orthonormal start; Dao et al. 2022, Monarch (arXiv "
        "2204.00595): projection of a trained weight. Changed: the projection can weight errors by calibration inputs; "
        "the merged weight includes both shuffles, which the published code leaves out"
    )
    Knobs = BlockShuffleKnobs
    dial = "blocks"
    spares_first_layer = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"} if self.knobs.activation_aware else ())

    @property
    def blocks(self) -> int:
        if self.knobs.blocks is None:
            raise TautError(f"{self.id}: give keep or blocks")
        return self.knobs.blocks

    def fits(self, site: LinearSite) -> str | None:
        legal = _legal(site)
        if self.blocks in legal:
            return None
        possible = f"possible: {', '.join(map(str, legal))}" if legal else "no number of blocks is possible"
        return (
            f"{self.blocks} blocks do not divide {site.outputs} x {site.inputs}, or do not make it smaller: {possible}"
        )

    def solve(self, site: LinearSite, keep: float) -> "BlockShuffleLinear":
        """Choose the fewest legal blocks whose parameters, bias included, are at most ``keep`` of the dense map's.

        Raises TautError when no number of blocks is that small.
        """
        dense = site.dense().parameters
        share = None
        for blocks in _legal(site):
            method = type(self)(self.knobs.model_copy(update={"blocks": blocks}))
            share = method.predict(site).parameters / dense
            if share <= keep:
                return method
        least = "none is possible" if share is None else f"the least is {share:.2g}"
        raise TautError(
            f"{self.id}: keep = {keep} leaves no blocks at {site.name} ({site.outputs} x {site.inputs}): {least}"
        )

    def predict(self, site: LinearSite) -> Cost:
        bias, width, shapes = site.outputs if site.bias else 0, site.width_in_bytes, _shapes(site, self.blocks)
        factors = sum(math.prod(shape) for shape in shapes)
        stored = sum(stored_bytes(shape, self.knobs.store, width) for shape in shapes)
        return Cost(factors + bias, stored + bias * width, 2.0 * factors)

    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> BlockShufflePart:
        part = BlockShufflePart(site, self.blocks, self.knobs.store, device, dtype)
        if device.type != "meta":
            # Orthonormal, as in the paper, which takes the polar factor of a Gaussian matrix: the same distribution.
            for name, (blocks, *shape) in zip(("projection", "weight"), _shapes(site, self.blocks), strict=True):
                matrices = [nn.init.orthogonal_(torch.empty(shape, device=device)) for _ in range(blocks)]
                part.fill(name, torch.stack(matrices))
        return part

    @torch.no_grad()
    def fit(self, part: BlockShufflePart, weight: Tensor, calibration: Calibration) -> None:
        """Fit the map on the calibration inputs. Without ``calibration.gram``, or with ``activation_aware`` off, the
        result is the best approximation of the weight."""
        gram = calibration.gram if self.knobs.activation_aware else None
        inner, outer = shuffled_factors(weight, self.blocks, gram, DAMPING)
        part.fill("projection", inner)
        part.fill("weight", outer)


def _shapes(site: LinearSite, blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of b1 and b2, both transposed."""
    run = min(site.inputs, site.outputs) // blocks
    return (blocks, site.inputs // blocks, run), (blocks, run, site.outputs // blocks)


def _legal(site: LinearSite) -> list[int]:
    """List the numbers of blocks that divide both sides, let every input reach every output, and add no parameters."""
    narrow, wide = sorted((site.inputs, site.outputs))
    return [
        blocks
        for blocks in range(2, math.isqrt(narrow) + 1)
        if narrow % blocks == wide % blocks == 0 and blocks * wide >= narrow + wide
    ]

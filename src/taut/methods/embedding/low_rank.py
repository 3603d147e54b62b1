"""A token table as the product of a narrow table and a shared map: E ~ A B, with A (V, R) and B (R, D)."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.kernels.svd import leading_directions
from taut.methods.part import Calibration, EmbeddingMethod, Knobs, TablePart

STANDARD_DEVIATION = 0.02
"""Of the entries of A B when the table is trained from scratch."""


class LowRankKnobs(Knobs):
    rank: int | None = Field(None, ge=1, description="R, the width of the stored rows; below V and D; or give keep")
    weighted: bool = Field(
        False, description="weigh each row's error by one more than how often calibration text uses it"
    )


class LowRankTable(TablePart):
    """``weight`` is A (V, R), ``projection`` is B (R, D) with orthonormal rows after a fit.

    So a row of A is as long as the part of the embedding it stands for, and a tied head never leaves R dimensions.
    """

    def __init__(self, site: TableSite, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(site)
        self.weight = nn.Parameter(torch.empty(site.rows, rank, device=device, dtype=dtype))
        self.projection = nn.Parameter(torch.empty(rank, site.width, device=device, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., D): rows of A times B, times ``scale``."""
        vectors = F.embedding(ids, self.weight, self.padding_idx) @ self.projection
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): (h B^T) A^T, which is R (V + D) multiplications a token instead of V D."""
        return F.linear(F.linear(hidden, self.projection), self.weight)

    def merged(self) -> Tensor:
        """A B, (V, D), without ``scale``."""
        return self.weight @ self.projection


class LowRankEmbedding(EmbeddingMethod):
    """Truncated SVD of the table. ``keep`` counts its stored bytes."""

    id = "embedding.low_rank"
    summary = "a narrow table and a shared map back to full width (SVD); a tied head uses both factors"
    source = (
        "Lan et al. 2020, ALBERT (arXiv 1909.11942), section 3.1: the factorised table; fitted by Eckart and Young, "
        "1936. Changed: tied heads go through the factors, and rows may be weighted by use"
    )
    Knobs = LowRankKnobs
    dial = "rank"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"frequency"} if self.knobs.weighted else ())

    @property
    def rank(self) -> int:
        if self.knobs.rank is None:
            raise TautError(f"{self.id}: give keep or rank")
        return self.knobs.rank

    def fits(self, site: TableSite) -> str | None:
        limit = min(site.rows, site.width)
        if self.rank < limit:
            return None
        return f"rank {self.rank} is no reduction of {site.rows} x {site.width}: it must be below {limit}"

    def solve(self, site: TableSite, keep: float) -> "LowRankEmbedding":
        """R = floor(keep V D / (V + D))."""
        dense, sides = site.rows * site.width, site.rows + site.width
        rank = int(keep * dense // sides)
        if rank < 1:
            raise TautError(
                f"{self.id}: keep = {keep} leaves no rank at {site.name} ({site.rows} x {site.width}): "
                f"the least is {sides / dense:.2g}"
            )
        return type(self)(self.knobs.model_copy(update={"rank": rank}))

    def predict(self, site: TableSite) -> Cost:
        numbers = self.rank * (site.rows + site.width)
        flops = 2.0 * self.rank * site.width + 2.0 * numbers * len(site.heads)
        return Cost(numbers, numbers * site.width_in_bytes, flops)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> LowRankTable:
        part = LowRankTable(site, self.rank, device, dtype)
        if not part.weight.is_meta:
            # Orthonormal rows of B scale the variance of A's entries by R / D.
            nn.init.normal_(part.weight, std=STANDARD_DEVIATION * math.sqrt(site.width / self.rank))
            part.projection.copy_(nn.init.orthogonal_(torch.empty(self.rank, site.width, device=device)))
            if site.padding_row is not None:
                part.weight[site.padding_row] = 0
        return part

    @torch.no_grad()
    def fit(self, part: LowRankTable, weight: Tensor, calibration: Calibration) -> None:
        """B spans the R directions that hold most of the (weighted) energy of the rows, A = E B^T: exact, since with
        B given each row's best coefficients do not depend on its weight. Raises TautError when ``weighted`` is set
        and no frequencies were given."""
        table = weight.double()
        rows = table
        if self.knobs.weighted:
            if calibration.frequency is None:
                raise TautError(f"{self.id}: weighted needs token frequencies; give calibration text or drop the knob")
            rows = table * (calibration.frequency.to(table) + 1)[:, None]
        _, directions = leading_directions(table.T @ rows, self.rank)
        part.weight.copy_(table @ directions)
        part.projection.copy_(directions.T)

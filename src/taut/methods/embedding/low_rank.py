"""A token table as the product of a narrow table and a shared map: E ~ A B, with A (V, R) and B (R, D)."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.svd import leading_directions

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of A B when the table is trained from scratch."""


class LowRankKnobs(Knobs):
    rank: int | None = Field(None, ge=1, description="R, the width of the stored rows; below V and D; or give keep")
    weighted: bool = Field(False, description="weight each row's error by (its count in calibration text + 1)")
    store: Store | None = Field(None, description="keep both factors in fewer bits")


class LowRankTable(TablePart):
    """A token table as the product of two factors.

    ``weight`` is A (V, R). ``projection`` is B (R, D), whose rows are orthonormal after a fit. So a row of A has the
    length of its row of A B, and a tied head compares vectors in R dimensions.
    """

    def __init__(
        self, site: TableSite, rank: int, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, dtype)
        self.hold("weight", (site.rows, rank), store, device)
        self.hold("projection", (rank, site.width), store, device)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), rows of A times B, times ``scale``."""
        vectors = self.held_rows("weight", ids, self.padding_idx) @ self.held("projection")
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V), (h B^T) A^T. R (V + D) multiplications per token, not V D."""
        return F.linear(F.linear(hidden, self.held("projection")), self.held("weight"))

    def merged(self) -> Tensor:
        """The dense table A B, (V, D), without ``scale``."""
        return self.held("weight") @ self.held("projection")


class LowRankEmbedding(EmbeddingMethod):
    """Truncated SVD of the table. ``keep`` counts its stored bytes."""

    id = "embedding.low_rank"
    summary = "a narrow table and a shared map to full width (SVD); a tied head uses both factors"
    source = (
        "Lan et al. 2020, ALBERT (arXiv 1909.11942), section 3.1: the factorised table; fitted by Eckart and Young, "
        "1936. Changed: a tied head multiplies by both factors, and rows may be weighted by use"
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
        return f"rank {self.rank} does not reduce {site.rows} x {site.width}: it must be below {limit}"

    def solve(self, site: TableSite, keep: float) -> "LowRankEmbedding":
        """Choose the greatest R whose two stored factors take at most ``keep`` of the dense table's bytes."""
        return self.greatest(site, keep, range(1, min(site.rows, site.width)))

    def predict(self, site: TableSite) -> Cost:
        numbers = self.rank * (site.rows + site.width)
        flops = 2.0 * self.rank * site.width + 2.0 * numbers * len(site.heads)
        return Cost(numbers, self._bytes(site, self.rank), flops)

    def _bytes(self, site: TableSite, rank: int) -> int:
        factors = ((site.rows, rank), (rank, site.width))
        return sum(stored_bytes(shape, self.knobs.store, site.width_in_bytes) for shape in factors)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> LowRankTable:
        part = LowRankTable(site, self.rank, self.knobs.store, device, dtype)
        if device.type != "meta":
            # B has orthonormal rows, so the variance of A B is R / D times that of A.
            deviation = STANDARD_DEVIATION * math.sqrt(site.width / self.rank)
            table = torch.randn(site.rows, self.rank, device=device) * deviation
            if site.padding_row is not None:
                table[site.padding_row] = 0
            part.fill("weight", table)
            part.fill("projection", nn.init.orthogonal_(torch.empty(self.rank, site.width, device=device)))
        return part

    @torch.no_grad()
    def fit(self, part: LowRankTable, weight: Tensor, calibration: Calibration) -> None:
        """Fit B to the R directions with most of the (weighted) energy of the rows, and set A = E B^T.

        This is exact: for a given B, a row's best coefficients do not depend on its weight. Raises TautError when
        ``weighted`` is set and there are no frequencies.
        """
        table = weight.double()
        rows = table
        if self.knobs.weighted:
            if calibration.frequency is None:
                raise TautError(f"{self.id}: weighted needs token frequencies; give calibration text or drop the knob")
            rows = table * (calibration.frequency.to(table) + 1)[:, None]
        _, directions = leading_directions(table.T @ rows, self.rank)
        part.fill("weight", table @ directions)
        part.fill("projection", directions.T)

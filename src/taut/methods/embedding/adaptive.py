"""A token table in bands by frequency: rarer tokens have narrower rows, and each band has a projection to width D."""

import math
from functools import partial
from itertools import accumulate, pairwise

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.svd import leading_directions
from taut.ops.tables.bands import banded, map_bytes, pack_classes
from taut.ops.tables.row_map import RowMap, RowPlaces

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""


class AdaptiveKnobs(Knobs):
    rank: int | None = Field(None, ge=1, description="R, the row width of the first band, at most D; or give keep")
    bands: tuple[float, ...] = Field(
        (0.1, 0.3, 0.6),
        min_length=1,
        description="share of the rows in each band, most frequent tokens first; the sum is 1",
    )
    factor: float = Field(4.0, ge=1, description="how many times narrower each band is than the one before")
    weighting: float = Field(
        0.5, ge=0, le=1, description="power of a token's frequency that weights its error; 0: all tokens alike"
    )
    store: Store | None = Field(None, description="keep the bands and their projections in fewer bits")

    @field_validator("bands")
    @classmethod
    def _shares(cls, bands: tuple[float, ...]) -> tuple[float, ...]:
        if min(bands) <= 0 or abs(sum(bands) - 1) > 1e-6:
            raise ValueError("expected shares above 0 whose sum is 1, such as [0.1, 0.3, 0.6]")
        return bands


class AdaptiveTable(TablePart):
    """A token table with narrower rows for rarer tokens.

    Band 0 is ``weight`` (1, n_0, R_0), band b is ``band_b`` (n_b, R_b). ``projection`` (R_0 + R_1 + ..., D) stacks the
    projections of the bands, each with orthonormal rows after a fit. ``classes`` holds the band of every row, packed
    in whole bits.

    A row is z P, and z is zero outside its band's columns. So the product has the same shape for any batch, and every
    bit of a token's vector is independent of its neighbours.
    """

    def __init__(
        self,
        site: TableSite,
        shapes: list[tuple[int, int]],
        store: Store | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(site, dtype)
        self.shapes = shapes
        self.edges = list(pairwise(accumulate((rank for _, rank in shapes), initial=0)))
        for name, shape in zip(self.names, shapes, strict=True):
            self.hold(name, (1, *shape) if name == "weight" else shape, store, device)
        self.hold("projection", (self.edges[-1][1], site.width), store, device)
        size = map_bytes(site.rows, len(shapes))
        self.register_buffer("classes", torch.zeros(size, dtype=torch.uint8, device=device))
        self._map = RowMap(site.rows, len(shapes))

    @property
    def names(self) -> list[str]:
        """The names of the bands' tensors."""
        return [f"band_{band}" if band else "weight" for band in range(len(self.shapes))]

    @property
    def places(self) -> RowPlaces:
        """The band of every row, its place in the band, and all rows in the order of the bands."""
        return self._map(self.classes)

    def padding(self, band: int) -> int | None:
        """The place of the padding row in this band, or None if it is in another."""
        here = self.padding_idx is not None and int(self.places.classes[self.padding_idx]) == band
        return int(self.places.offsets[self.padding_idx]) if here else None

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), times ``scale``. Raises IndexError for an id outside the table."""
        places, width = self.places, self.edges[-1][1]
        readers = [partial(self._read, band) for band in range(len(self.shapes))]
        coordinates = banded(ids, places.classes, places.offsets, readers, width, self.dtype)
        vectors = coordinates @ self.held("projection")
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V). Projects the hidden state, then scores it band by band."""
        rotated = F.linear(hidden, self.held("projection"))
        scores = [F.linear(rotated[..., slice(*self.edges[band])], self._rows(band)) for band in range(len(self.names))]
        return self.places.undo(torch.cat(scores, dim=-1), dim=-1)

    def merged(self) -> Tensor:
        """The dense table (V, D), without ``scale``."""
        maps = self.held("projection")
        rows = [self._rows(band) @ maps[slice(*self.edges[band])] for band in range(len(self.names))]
        return self.places.undo(torch.cat(rows), dim=0)

    def extra_repr(self) -> str:
        bands = ", ".join(f"{rows} x {rank}" for rows, rank in self.shapes)
        return f"{self.num_embeddings}, {self.embedding_dim}, bands={bands}, dtype={self.dtype}"

    def _rows(self, band: int) -> Tensor:
        return self.held(self.names[band]).view(self.shapes[band])

    def _read(self, band: int, offsets: Tensor) -> Tensor:
        """Read (n,) places in a band: (n, R_0 + R_1 + ...), zero outside the band's columns."""
        start, stop = self.edges[band]
        rows = self.held_rows(self.names[band], offsets, self.padding(band))
        return F.pad(rows, (start, self.edges[-1][1] - stop))


class AdaptiveEmbedding(EmbeddingMethod):
    """Fits a truncated SVD to each frequency band. ``keep`` counts the stored bytes of the table."""

    id = "embedding.adaptive"
    summary = "bands by frequency: rarer tokens have narrower rows, each band has its own projection to full width"
    source = (
        "Baevski and Auli 2019, Adaptive Input Representations (arXiv 1809.10853); Grave et al. 2017 (arXiv "
        "1609.04309). Changed: fitted to a trained table by an SVD of each band; bands are shares of the rows; a tied "
        "head scores all rows in one softmax, without the hierarchy of clusters"
    )
    Knobs = AdaptiveKnobs
    dial = "rank"
    needs = frozenset({"frequency"})

    @property
    def rank(self) -> int:
        if self.knobs.rank is None:
            raise TautError(f"{self.id}: give keep or rank")
        return self.knobs.rank

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        if self.rank > site.width:
            return f"rank {self.rank} is above the width of {site.rows} x {site.width}: it may be at most {site.width}"
        shapes = self._shapes(site)
        if not all(rows for rows, _ in shapes):
            return f"bands {list(self.knobs.bands)} of {site.rows} rows leave at least one of {len(shapes)} bands empty"
        numbers = self._numbers(site)
        if numbers >= site.rows * site.width:
            return (
                f"rank {self.rank} does not reduce {site.rows} x {site.width}: bands and projections have "
                f"{numbers} numbers, the table {site.rows * site.width}"
            )
        return None

    def solve(self, site: TableSite, keep: float) -> "AdaptiveEmbedding":
        """Choose the greatest R whose bands, projections and row map take at most ``keep`` of the dense bytes."""
        return self.greatest(site, keep, range(1, site.width + 1))

    def predict(self, site: TableSite) -> Cost:
        """The exact cost. A lookup multiplies by the projections of all bands."""
        shapes = self._shapes(site)
        total = sum(rank for _, rank in shapes)
        projection = (total, site.width)
        stored = sum(stored_bytes(shape, self.knobs.store, site.width_in_bytes) for shape in (*shapes, projection))
        flops = 2.0 * total * site.width + 2.0 * self._numbers(site) * len(site.heads)
        return Cost(self._numbers(site), stored + map_bytes(site.rows, len(shapes)), flops)

    def _numbers(self, site: TableSite) -> int:
        return sum(rank * (rows + site.width) for rows, rank in self._shapes(site))

    def _shapes(self, site: TableSite) -> list[tuple[int, int]]:
        """The (rows, width) of every band."""
        edges = [round(share * site.rows) for share in accumulate(self.knobs.bands)]
        edges[-1] = site.rows
        return [
            (stop - start, max(1, int(self.rank / self.knobs.factor**band)))
            for band, (start, stop) in enumerate(pairwise((0, *edges)))
        ]

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> AdaptiveTable:
        """Build the part. The bands of a part trained from scratch follow the original order of the rows."""
        part = AdaptiveTable(site, self._shapes(site), self.knobs.store, device, dtype)
        if device.type != "meta":
            self._place(part, torch.arange(site.rows, device=device))
            maps = []
            for band, (rows, rank) in enumerate(part.shapes):
                # The projection has orthonormal rows, so the vectors have R / D times the variance of the stored rows.
                table = torch.randn(rows, rank, device=device) * STANDARD_DEVIATION * math.sqrt(site.width / rank)
                if (padding := part.padding(band)) is not None:
                    table[padding] = 0
                part.fill(part.names[band], table)
                maps.append(nn.init.orthogonal_(torch.empty(rank, site.width, device=device)))
            part.fill("projection", torch.cat(maps))
        return part

    @torch.no_grad()
    def fit(self, part: AdaptiveTable, weight: Tensor, calibration: Calibration) -> None:
        """Fit each band's projection to the R_b directions with most of the weighted energy of its rows.

        Without frequencies all rows weigh the same, and the bands follow the original order of the rows. In WordPiece
        and BPE vocabularies that order roughly descends by frequency.
        """
        table, frequency = weight.double(), calibration.frequency
        order = torch.arange(len(table), device=table.device)
        share = torch.ones(len(table), dtype=table.dtype, device=table.device)
        if frequency is not None:
            order = frequency.to(table).argsort(descending=True, stable=True)
            share = (frequency.to(table) + 1) ** self.knobs.weighting
        self._place(part, order)
        maps = []
        for band, (rows, (_, rank)) in enumerate(zip(self._members(part), part.shapes, strict=True)):
            band_rows = table[rows]
            _, directions = leading_directions(band_rows.T @ (band_rows * share[rows, None]), rank)
            part.fill(part.names[band], band_rows @ directions)
            maps.append(directions.T)
        part.fill("projection", torch.cat(maps))

    def _place(self, part: AdaptiveTable, order: Tensor) -> None:
        """Assign rows to bands: the first rows of ``order`` (V,) to band 0, and so on."""
        sizes = torch.tensor([rows for rows, _ in part.shapes], device=order.device)
        bands = torch.arange(len(sizes), device=order.device).repeat_interleave(sizes)
        classes = torch.empty_like(order).index_copy_(0, order, bands)
        part.classes.copy_(pack_classes(classes, len(sizes)))

    def _members(self, part: AdaptiveTable) -> tuple[Tensor, ...]:
        """The rows of every band, in the order in which they are stored."""
        return part.places.order.split([rows for rows, _ in part.shapes])

"""A token table with rotated rows of unequal width: a router gives more columns to tokens that matter more.

The first columns of every row are the directions with the most energy, and the row's class sets its width. Rows are
cut into pages of equal length. So one tensor, whose size is known beforehand, holds any assignment of classes.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.embedding.dynamic.router import class_scores, gate, initial_values, with_noise
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.svd import leading_directions
from taut.ops.tables.allocation import allocate
from taut.ops.tables.bands import banded, map_bytes, pack_classes, places

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""


class DynamicKnobs(Knobs):
    width: float | None = Field(None, gt=0, description="columns per row on average; or give keep")
    page: int | None = Field(
        None,
        ge=2,
        description="columns that are kept or dropped together, and with a store rounded together; none: the greatest "
        "divisor of D up to 64 and D / 4",
    )
    classes: tuple[float, ...] = Field(
        (0.0, 0.125, 0.25, 0.5, 0.75, 1.0), description="widths that a row may have, as shares of D; ascending"
    )
    importance: Literal["frequency", "sensitivity", "none"] = Field(
        "frequency",
        description="what weights a row's error: the root of (its count in calibration text + 1), the root of its "
        "squared gradients, or nothing",
    )
    store: Store | None = Field(None, description="keep pages and rotation in fewer bits")

    @field_validator("classes")
    @classmethod
    def _rising(cls, classes: tuple[float, ...]) -> tuple[float, ...]:
        if len(classes) < 2 or classes[0] < 0 or classes[-1] > 1 or any(a >= b for a, b in pairwise(classes)):
            raise ValueError("expected two or more ascending shares from 0 to 1, such as [0.125, 0.5, 1.0]")
        return classes


@dataclass(frozen=True)
class ColumnPlaces:
    """Where rows are stored.

    ``classes`` (V,) and ``offsets`` (V,) are the class of every row and its rank in the class. ``starts`` are the first
    pages of the classes. ``rows`` lists the rows in the order of the pages, split by class, and ``order`` (V,) is the
    place of every row in that order. ``source`` and ``state`` identify the packed classes.
    """

    source: Tensor
    state: tuple[int, int]
    classes: Tensor
    offsets: Tensor
    starts: tuple[int, ...]
    rows: tuple[Tensor, ...]
    order: Tensor


class DynamicTable(TablePart):
    """A token table of pages, in which each row has the width of its class.

    ``weight`` (pages, columns of a page) holds the rows class by class, followed by zeros. ``projection`` (W, D)
    rotates back from the W columns of the widest class. ``classes`` is the packed class of every row.

    Unpacked, every row has all W columns (``columns_unpacked``, (V, W)) and a value for each step from one class to the
    next (``router_unpacked``, (V, C - 1)). The score of a class is the sum of the steps up to it. The forward pass uses
    the classes with the greatest sum of scores that fit the pages, as ``repack`` does. In training mode it samples a
    class for every token instead (straight-through Gumbel softmax). A loss moves columns from row to row only if it
    includes their price: ``expected_width()`` times some factor.
    """

    def __init__(
        self,
        site: TableSite,
        pages: tuple[int, ...],
        page: int,
        count: int,
        store: Store | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``pages`` is the number of pages per row in each class, ``count`` that of all pages."""
        super().__init__(site, dtype)
        self.pages, self.page, self.count, self.store = pages, page, count, store
        self.widths = tuple(pages_per_row * page for pages_per_row in pages)
        self.hold("weight", (count, page), store, device)
        self.hold("projection", (self.widths[-1], site.width), store, device)
        packed = map_bytes(site.rows, len(pages))
        self.register_buffer("classes", torch.zeros(packed, dtype=torch.uint8, device=device))
        self.register_parameter("columns_unpacked", None)
        self.register_parameter("router_unpacked", None)
        self._places: ColumnPlaces | None = None
        self._routed: tuple[Tensor, tuple[int, int], Tensor] | None = None

    @property
    def places(self) -> ColumnPlaces:
        """The places of all rows, derived from ``classes`` and kept until they change. Not stored."""
        source, state, cached = self.classes, _state(self.classes), self._places
        if cached is None or cached.source is not source or cached.state != state:
            classes, offsets = places(source, len(self.pages), self.num_embeddings)
            sizes = torch.bincount(classes, minlength=len(self.pages)).tolist()
            starts = accumulate((size * pages for size, pages in zip(sizes, self.pages, strict=True)), initial=0)
            rows = classes.long().argsort(stable=True)
            order = torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
            self._places = ColumnPlaces(source, state, classes, offsets, tuple(starts)[:-1], rows.split(sizes), order)
        return self._places

    @torch.no_grad()
    def set_rows(self, columns: Tensor, levels: Tensor) -> None:
        """Store as many of the coordinates ``columns`` (V, W) as the class of every row, ``levels`` (V,), allows."""
        self.classes.copy_(pack_classes(levels, len(self.pages)))
        stored = columns.new_zeros(self.count, self.page)
        for rows, start, width in zip(self.places.rows, self.places.starts, self.widths, strict=True):
            pages = columns[rows.to(columns.device), :width].reshape(-1, self.page)
            stored[start : start + len(pages)] = pages
        self.fill("weight", stored)

    def coordinates(self, table: Tensor) -> Tensor:
        """The least-squares coordinates of ``table`` for the rotation as stored: (V, D) -> (V, W) float64."""
        return table.double() @ torch.linalg.pinv(self.held("projection").double())

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), times ``scale``. Raises IndexError for an id outside the table.

        Reads only the stored columns of a row. The product with the rotation uses all W columns of every token. With
        one product per class, the last bit of a vector would depend on its neighbours.
        """
        vectors = self._columns(ids) @ self.held("projection")
        if self.padding_idx is not None and torch.is_grad_enabled():
            vectors = torch.where((ids == self.padding_idx)[..., None], vectors.detach(), vectors)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V).

        Rotates the hidden state once, then multiplies by as many columns as each class has.
        """
        if self.columns_unpacked is not None:
            return F.linear(hidden, self.merged())
        rotated, pages = F.linear(hidden, self.held("projection")), self.held("weight")
        scores = []
        for rows, start, row_pages, width in zip(
            self.places.rows, self.places.starts, self.pages, self.widths, strict=True
        ):
            block = pages[start : start + len(rows) * row_pages].view(len(rows), width)
            scores.append(F.linear(rotated[..., :width], block))
        return torch.cat(scores, dim=-1).index_select(-1, self.places.order)

    def merged(self) -> Tensor:
        """The dense table (V, D), without ``scale``."""
        return self._columns(torch.arange(self.num_embeddings, device=self.classes.device)) @ self.held("projection")

    def expected_width(self, frequency: Tensor | None = None) -> Tensor:
        """The average number of columns that a lookup reads, a 0-d tensor.

        ``frequency`` (V,) is how often each token is looked up; None means all equally often. Unpacked, it is the
        expectation under the router, for a penalty in a loss.
        """
        widths = torch.tensor(self.widths, dtype=torch.float32, device=self.classes.device)
        if self.router_unpacked is None:
            expected = widths[self.places.classes.long()]
        else:
            expected = class_scores(self.router_unpacked).softmax(-1) @ widths
        if frequency is None:
            return expected.mean()
        frequency = frequency.to(expected.device, torch.float64)
        return (expected.double() @ (frequency / frequency.sum())).float()

    def expected_bits(self, frequency: Tensor | None = None) -> Tensor:
        """The average stored bits that a lookup reads of a row, scales included, divided by D."""
        page_bytes = stored_bytes((1, self.page), self.store, self.dtype.itemsize)
        return self.expected_width(frequency) * (8 * page_bytes / self.page / self.embedding_dim)

    def unpack(self, original: Tensor | None = None) -> None:
        with torch.no_grad():
            if original is None:
                columns = self._columns(torch.arange(self.num_embeddings, device=self.classes.device))
            else:
                columns = self.coordinates(original.to(self.classes.device))
            router = initial_values(self.places.classes, len(self.pages))
        super().unpack(original)
        # ``repack`` creates the pages again. Until then they must not be a parameter.
        self._parameters.pop("weight_unpacked", None)
        if self.store is None:
            self.weight = None
        self.columns_unpacked, self.router_unpacked = nn.Parameter(columns.float()), nn.Parameter(router)

    def repack(self) -> None:
        super().repack()
        if self.columns_unpacked is not None:
            if self.store is None:
                pages = self.columns_unpacked.new_empty(self.count, self.page, dtype=self.dtype)
                self.weight = nn.Parameter(pages)
            self.set_rows(self.columns_unpacked.detach(), self._division())
            self.columns_unpacked = self.router_unpacked = self._routed = None

    def _columns(self, ids: Tensor) -> Tensor:
        """The columns of tokens: (...) ids -> (..., W), zero beyond the width of the token's class."""
        if self.columns_unpacked is not None:
            return self._unpacked_columns(ids)
        readers = [partial(self._read, kind) for kind in range(len(self.pages))]
        return banded(ids, self.places.classes, self.places.offsets, readers, self.widths[-1], self.dtype)

    def _read(self, kind: int, offsets: Tensor) -> Tensor:
        """Read rows by their ranks in a class: (n,) -> (n, W)."""
        pages = self.pages[kind]
        if not pages:
            return torch.zeros(len(offsets), self.widths[-1], dtype=self.dtype, device=offsets.device)
        first = self.places.starts[kind] + offsets.long() * pages
        rows = self.held_rows("weight", first[:, None] + torch.arange(pages, device=first.device))
        return F.pad(rows.flatten(1), (0, self.widths[-1] - self.widths[kind]))

    def _unpacked_columns(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.columns_unpacked).unflatten(-1, (self.pages[-1], self.page))
        rows = rows if self.store is None else self.store.straight_through(rows)
        scores = class_scores(F.embedding(ids, self.router_unpacked))
        if self.training:
            scores = with_noise(scores, self.random_step)
            self.random_step += 1
        keep = gate(scores, scores.argmax(-1) if self.training else self._division()[ids])
        masks = torch.tensor([[page < pages for page in range(self.pages[-1])] for pages in self.pages]).to(keep)
        return (rows * (keep @ masks)[..., None]).flatten(-2).to(self.dtype)

    def _division(self) -> Tensor:
        """(V,) int64: the class that ``repack`` gives every row, from the router's values."""
        router, state = self.router_unpacked, _state(self.router_unpacked)
        if self._routed is None or self._routed[0] is not router or self._routed[1] != state:
            division = allocate(-class_scores(router.detach()), torch.tensor(self.pages), self.count).to(router.device)
            self._routed = router, state, division
        return self._routed[2]


class DynamicEmbedding(EmbeddingMethod):
    """Rotates the table and gives each token a row of one of a few widths. ``keep`` counts stored bytes."""

    id = "embedding.dynamic"
    summary = "rotated rows of unequal width: a router gives columns to the tokens that gain most from them"
    source = (
        "no single paper; nearest are Joglekar et al. 2019, Neural Input Search (arXiv 1907.04471), and Ginart et al. "
        "2019, Mixed Dimension Embeddings (arXiv 1909.11810). Changed: fitted to a trained table, one rotation for "
        "all widths, widths by Lagrangian allocation under a byte budget; in healing a Gumbel-softmax router (Jang et "
        "al. 2016, arXiv 1611.01144) by token id"
    )
    Knobs = DynamicKnobs
    dial = "width"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.knobs.importance} - {"none"})

    @property
    def width(self) -> float:
        if self.knobs.width is None:
            raise TautError(f"{self.id}: give keep or width")
        return self.knobs.width

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        reason = self._unpaged(site)
        if reason:
            return reason
        least, most = self._limits(site)
        if least <= self._count(site) <= most:
            return None
        low, high = (count * self._page(site) / site.rows for count in (least, most))
        return (
            f"width {self.width:g} is impossible for {site.rows} x {site.width}: the average may be {low:.4g} (all "
            f"rows in the narrowest class) to {high:.4g}"
        )

    def solve(self, site: TableSite, keep: float) -> "DynamicEmbedding":
        """Choose the most pages that, stored with rotation and classes, take at most ``keep`` of the dense bytes.

        Raises TautError if there are none, or if rows cannot be cut into pages.
        """
        reason = self._unpaged(site)
        if reason:
            raise TautError(f"{self.id}: {reason}")
        least, most = self._limits(site)
        choices = range(least, most + 1)
        fitting = bisect_right(choices, keep * site.dense().bytes, key=lambda count: self._bytes(site, count))
        if not fitting:
            share = self._bytes(site, least) / site.dense().bytes
            raise TautError(f"{self.id}: keep = {keep} is too little at {site.name}: the least is {share:.2g}")
        return self._at(site, choices[fitting - 1])

    def predict(self, site: TableSite) -> Cost:
        """The exact cost. The FLOPs of a head are those of all pages, that is, of the columns that all rows keep."""
        count, widest = self._count(site), self._pages(site)[-1] * self._page(site)
        numbers = count * self._page(site) + widest * site.width
        flops = 2.0 * widest * site.width + 2.0 * numbers * len(site.heads)
        return Cost(numbers, self._bytes(site, count), flops)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> DynamicTable:
        pages, count = self._pages(site), self._count(site)
        part = DynamicTable(site, pages, self._page(site), count, self.knobs.store, device, dtype)
        if device.type != "meta":
            # Without text the token ids serve as frequency ranks, and the counts follow Zipf's law.
            use = 1 / torch.arange(1.0, site.rows + 1, dtype=torch.float64)
            lost = 1 - torch.tensor(pages, dtype=torch.float64) / pages[-1]
            levels = allocate(use[:, None] * lost, torch.tensor(pages), count)
            kept = torch.tensor(part.widths, device=device)[levels.to(device)].clamp_min(1)
            columns = torch.randn(site.rows, part.widths[-1], device=device)
            columns *= STANDARD_DEVIATION * (site.width / kept).sqrt()[:, None]
            if site.padding_row is not None:
                columns[site.padding_row] = 0
            part.fill("projection", nn.init.orthogonal_(torch.empty(part.widths[-1], site.width, device=device)))
            part.set_rows(columns, levels)
        return part

    @torch.no_grad()
    def fit(self, part: DynamicTable, weight: Tensor, calibration: Calibration) -> None:
        """Fit directions by (weighted) energy, then assign the classes that lower the summed error most.

        A row's error, from dropped columns and from rounding, is measured and multiplied by its importance. Raises
        TautError without calibration text, unless ``importance`` is none.
        """
        table = weight.double()
        importance = self._importance(table, calibration)
        _, directions = leading_directions(table.T @ (table * importance[:, None]), part.widths[-1])
        part.fill("projection", directions.T)
        columns = part.coordinates(table)
        pages = columns.view(len(columns), -1, part.page)
        saved = pages.square().sum(2)
        if part.store is not None:
            rounded = part.store.unpack(part.store.pack(pages), tuple(pages.shape), pages.dtype)
            saved -= (rounded - pages).square().sum(2)
        # The error that each class avoids. It is negative for a page whose rounding error exceeds its energy.
        loss = -importance[:, None] * F.pad(saved.cumsum(1), (1, 0))[:, list(part.pages)]
        part.set_rows(columns, allocate(loss, torch.tensor(part.pages), part.count))

    def _importance(self, table: Tensor, calibration: Calibration) -> Tensor:
        """The importance of every row, (V,) float64."""
        kind = self.knobs.importance
        if kind == "none":
            return table.new_ones(len(table))
        statistic = calibration.frequency if kind == "frequency" else calibration.sensitivity
        if statistic is None:
            raise TautError(f"{self.id}: importance: {kind} needs calibration text; give some, or importance: none")
        statistic = statistic.to(table)
        # A token that this text lacks may still occur in another, so its importance must not be zero.
        return (statistic + (1.0 if kind == "frequency" else statistic[statistic > 0].min())).sqrt()

    def _unpaged(self, site: TableSite) -> str | None:
        """Why rows cannot be cut into pages and classes at any budget, or None if they can."""
        page, divisors = self._page(site), _divisors(site.width)
        if not divisors:
            return f"the width {site.width} has no divisor that could be the page length"
        if page not in divisors:
            nearest = min(divisors, key=lambda size: abs(size - page))
            return (
                f"pages of {page} columns do not divide the width {site.width} in two or more; the nearest is {nearest}"
            )
        pages = self._pages(site)
        if len(pages) < 2:
            return f"classes {list(self.knobs.classes)} all round to {pages[0] * page} columns in pages of {page}"
        return None

    def _page(self, site: TableSite) -> int:
        if self.knobs.page is not None:
            return self.knobs.page
        return max((size for size in _divisors(site.width) if size <= min(64, site.width // 4)), default=2)

    def _pages(self, site: TableSite) -> tuple[int, ...]:
        """The number of pages per row in each class, ascending and without duplicates from rounding."""
        whole = site.width // self._page(site)
        return tuple(sorted({round(share * whole) for share in self.knobs.classes}))

    def _count(self, site: TableSite) -> int:
        return round(site.rows * self.width / self._page(site))

    def _limits(self, site: TableSite) -> tuple[int, int]:
        """The fewest and the most pages that are useful.

        The fewest put every row in the narrowest class. The most have fewer numbers than the dense table, and no row
        wider than the widest class.
        """
        page, pages = self._page(site), self._pages(site)
        numbers = site.rows * site.width - pages[-1] * page * site.width - 1
        return max(1, site.rows * pages[0]), min(numbers // page, site.rows * pages[-1])

    def _at(self, site: TableSite, count: int) -> "DynamicEmbedding":
        return type(self)(self.knobs.model_copy(update={"width": count * self._page(site) / site.rows}))

    def _bytes(self, site: TableSite, count: int) -> int:
        page, widest = self._page(site), self._pages(site)[-1] * self._page(site)
        shapes = ((count, page), (widest, site.width))
        stored = sum(stored_bytes(shape, self.knobs.store, site.width_in_bytes) for shape in shapes)
        return stored + map_bytes(site.rows, len(self._pages(site)))


def _divisors(width: int) -> list[int]:
    """The divisors of ``width`` between one and ``width``, both excluded."""
    return [size for size in range(2, width) if width % size == 0]


def _state(tensor: Tensor) -> tuple[int, int]:
    """A key that changes when the contents of ``tensor`` change."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

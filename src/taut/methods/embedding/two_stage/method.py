"""A token table in two stages: a short code for every row, and a finer code of the residual for rows that matter."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.embedding.two_stage.basis import coding_basis
from taut.methods.embedding.two_stage.row_codes import Centroids, Numbers, RowCodes
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes
from taut.ops.codebooks.product_codes import LENGTH_ONE, CodeLayout, decode_lengths, encode_lengths
from taut.ops.quantization.rowwise import RowFormat
from taut.ops.tables.bands import map_bytes, pack_classes
from taut.ops.tables.row_map import RowMap, RowPlaces

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""
FINE_SHARE = 0.5
"""Length of a random second stage, relative to the first stage."""
UNSEEN = 0.5
"""Occurrences added to every row, so that unseen rows have some importance."""
LENGTH_ROOM = 2.0
"""Rows are scaled by this factor before coding. Decoded rows are shorter than the originals; lengths correct both."""
PIECE = 4096
"""How many rows are expanded at a time when all are needed."""


class TwoStageKnobs(Knobs):
    refine: float | None = Field(None, ge=0, le=1, description="share of the rows with a second stage; or give keep")
    subvector: int = Field(16, ge=1, description="first stage: numbers per code, a divisor of R")
    fine_subvector: int = Field(8, ge=1, description="second stage: numbers per code, a divisor of R")
    bits: Literal[2, 3, 4, 6, 8] | None = Field(
        None, description="second stage: store numbers of this many bits instead of codes"
    )
    group: int | None = Field(None, ge=2, description="with bits: how many numbers of a row share a scale; none: all")
    centroids: Literal[256, 16] = Field(256, description="centroids a code chooses from; 256 take 8 bits, 16 take 4")
    rank: int | None = Field(
        None, ge=1, description="R: code the coordinates of rows in this many principal directions; none: rows as is"
    )
    importance: Literal["frequency", "sensitivity", "error"] = Field(
        "frequency",
        description="what weights a row's first-stage error when rows of the second stage are chosen: occurrences or "
        "squared gradients, summed over calibration text; or nothing",
    )
    weighting: float = Field(
        0.5, ge=0, le=1, description="power of that importance; codes are fitted with the same weights"
    )
    store: Store | None = Field(None, description="keep codebooks and directions in fewer bits")


@dataclass(frozen=True)
class Layout:
    """What a part holds.

    ``first`` and ``fine`` are the formats of the stages, and ``count`` of V rows have a second stage. A row has
    ``rank`` R coordinates. If ``rank`` is None it has D coordinates, and there is no ``projection``.
    """

    first: RowCodes
    fine: RowCodes
    count: int
    rank: int | None

    def codes(self, site: TableSite) -> dict[str, tuple[int, ...]]:
        """The shapes of the uint8 tensors by name."""
        shapes: dict[str, tuple[int, ...]] = {"weight": self.first.shape(site.rows), "lengths": (site.rows,)}
        if self.count:
            shapes |= {"fine": self.fine.shape(self.count), "refined": (map_bytes(site.rows, 2),)}
        return shapes

    def floats(self, site: TableSite) -> dict[str, tuple[int, ...]]:
        """The shapes of the float tensors by name."""
        shapes = {"codebook": self.first.book_shape}
        if self.count and self.fine.book_shape is not None:
            shapes["fine_codebook"] = self.fine.book_shape
        if self.rank is not None:
            shapes["projection"] = (self.rank, site.width)
        return shapes


class TwoStageTable(TablePart):
    """A token table of first-stage codes for all rows and second-stage codes for some.

    ``weight`` (V, 1, bytes) holds the first-stage codes into ``codebook``. ``refined`` (one bit per row) marks the rows
    with a second stage. ``fine`` holds that stage in the order of those rows: (n, 1, bytes) codes into
    ``fine_codebook``, or packed rows (ops.quantization.rowwise). The stages add up to coordinates, which
    ``projection`` (R, D), if any, maps to full width. ``lengths`` (V,) multiplies the result, one byte each
    (ops.codebooks.product_codes).

    Unpacked with the original, a row's coordinates are the parameter ``points_unpacked`` (V, R), and every use
    chooses the codes again.
    """

    def __init__(
        self, site: TableSite, layout: Layout, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, dtype)
        self.layout = layout
        for name, shape in layout.codes(site).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.uint8, device=device))
        for name, shape in layout.floats(site).items():
            self.hold(name, shape, store, device)
        self._map = RowMap(site.rows, 2)

    @property
    def places(self) -> RowPlaces:
        """Whether each row has a second stage (class 1), and the row's place in its class."""
        return self._map(self.refined)

    @property
    def refined_rows(self) -> Tensor:
        """The rows (n,) with a second stage, in the order of ``fine``."""
        return self.places.order[self.num_embeddings - self.layout.count :]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), times ``scale``. Raises IndexError for an id outside the table."""
        vectors = self._rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V).

        Without gradients it expands no row but adds up products with all centroids. With gradients, or unpacked, it
        expands rows to R numbers piece by piece.
        """
        flat = hidden.reshape(-1, self.embedding_dim)
        if self.layout.rank is not None:
            flat = F.linear(flat, self.held("projection"))
        ids = torch.arange(self.num_embeddings, device=hidden.device)
        if torch.is_grad_enabled() or "lengths_unpacked" in self._parameters:
            scores = torch.cat([flat @ self._coordinates(piece).T for piece in ids.split(PIECE)], dim=1)
        else:
            scores = self.layout.first.scores(flat, self.weight, self._book("codebook"))
            if self.layout.count:
                fine = self.layout.fine.scores(flat, self.fine, self._book("fine_codebook"))
                scores = scores.index_add(1, self.refined_rows, fine)
        return (scores * self._lengths(ids)).view(*hidden.shape[:-1], self.num_embeddings)

    def merged(self) -> Tensor:
        """The dense table (V, D), without ``scale``."""
        ids = torch.arange(self.num_embeddings, device=self.weight.device)
        return torch.cat([self._rows(piece) for piece in ids.split(PIECE)])

    def numbers(self) -> int:
        """Returns V D, the dense count, because codes stand for the numbers of all rows."""
        return self.num_embeddings * self.embedding_dim

    def unpack(self, original: Tensor | None = None) -> None:
        """Make codebooks, directions and lengths trainable, and with ``original`` (V, D) also the choice of codes."""
        super().unpack(original)
        if original is not None:
            self.register_parameter("points_unpacked", nn.Parameter(self.points(original.to(self.weight.device))))
        lengths = decode_lengths(self.lengths, torch.float32)[:, None]
        self.register_parameter("lengths_unpacked", nn.Parameter(lengths))

    @torch.no_grad()
    def repack(self) -> None:
        super().repack()
        lengths, points = (self._parameters.pop(f"{name}_unpacked", None) for name in ("lengths", "points"))
        if lengths is not None:
            self.lengths.copy_(encode_lengths(lengths[:, 0]))
        if points is not None:
            self.set_codes(points)

    @torch.no_grad()
    def points(self, table: Tensor) -> Tensor:
        """The vectors to be coded: (V, D) float -> (V, R) float32, coordinates of rows scaled to the same length."""
        table = table.double()
        lengths = table.norm(dim=1, keepdim=True)
        rows = table / torch.where(lengths > 0, lengths, 1.0) * (lengths.max() * LENGTH_ROOM)
        if self.layout.rank is not None:
            rows = rows @ torch.linalg.pinv(self.held("projection").double())
        return rows.float()

    @torch.no_grad()
    def set_codes(self, points: Tensor) -> None:
        """Store the nearest codes for ``points`` (V, R), and in the second stage those of the residuals."""
        self.weight.copy_(self.layout.first.encode(points, self._book("codebook")))
        if self.layout.count:
            self.fine.copy_(self.layout.fine.encode(self.left(points)[self.refined_rows], self._book("fine_codebook")))

    @torch.no_grad()
    def left(self, points: Tensor) -> Tensor:
        """The residuals of ``points`` (V, R) after the first stage."""
        return points - self.layout.first.rounded(points, self._book("codebook")).to(points)

    @torch.no_grad()
    def set_lengths(self, table: Tensor) -> None:
        """Set ``lengths`` so that every row is as long as in ``table`` (V, D)."""
        self.lengths.fill_(LENGTH_ONE)
        coded, target = self.merged().double().norm(dim=1), table.double().norm(dim=1)
        self.lengths.copy_(encode_lengths(torch.where(coded > 0, target / coded, 0.0)))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, refined={self.layout.count}, dtype={self.dtype}"

    def _book(self, name: str) -> Tensor | None:
        return self.held(name) if name in self._held else None

    def _rows(self, ids: Tensor) -> Tensor:
        """(n,) ids -> (n, D)."""
        coordinates = self._coordinates(ids)
        vectors = coordinates if self.layout.rank is None else coordinates @ self.held("projection")
        return vectors * self._lengths(ids)[:, None]

    def _coordinates(self, ids: Tensor) -> Tensor:
        """(n,) ids -> (n, R), the sum of both stages."""
        layout, book, points = self.layout, self._book("codebook"), self._parameters.get("points_unpacked")
        if points is None:
            values = layout.first.read(self.weight, ids, book, self.dtype)
        else:
            points = F.embedding(ids, points, self.padding_idx)
            values = layout.first.rounded(points, book)
        if layout.count:
            chosen = self.places.classes.index_select(0, ids).nonzero().squeeze(1)
            # While gradients are recorded the second stage is read even for no rows, so that its codebook gets zeros.
            if len(chosen) or torch.is_grad_enabled():
                book = self._book("fine_codebook")
                if points is None:
                    fine = layout.fine.read(self.fine, self.places.offsets[ids[chosen]], book, self.dtype)
                else:
                    fine = layout.fine.rounded((points - values).detach()[chosen], book).to(values)
                values = values.index_add(0, chosen, fine)
        return values if points is None else values + (points - points.detach()).to(values)

    def _lengths(self, ids: Tensor) -> Tensor:
        """The lengths of rows: (n,) ids -> (n,)."""
        unpacked = self._parameters.get("lengths_unpacked")
        if unpacked is None:
            return decode_lengths(self.lengths.index_select(0, ids), self.dtype)
        lengths = F.embedding(ids, unpacked, self.padding_idx)[:, 0]
        with torch.no_grad():
            rounding = decode_lengths(encode_lengths(lengths), lengths.dtype) - lengths
        return (lengths + rounding).to(self.dtype)


class TwoStageEmbedding(EmbeddingMethod):
    """Codes rows, and the residuals of some. ``keep`` counts the table's stored bytes and sets the share refined."""

    id = "embedding.two_stage"
    summary = "a short code for every row, a finer code of the residual for frequent rows: about 0.5 bits per number"
    source = (
        "Jegou et al. 2011, Product Quantization for Nearest Neighbor Search (TPAMI 33); Chen et al. 2010, residual "
        "vector quantization (Sensors 10); Ge et al. 2013, Optimized Product Quantization (CVPR): the directions. "
        "Changed: the second stage belongs to rows chosen once by importance times error, not to queries; lengths are "
        "stored separately, and codes are fitted with weights"
    )
    Knobs = TwoStageKnobs
    dial = "refine"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.knobs.importance == "error" else frozenset({"frequency", self.knobs.importance})

    @property
    def refine(self) -> float:
        if self.knobs.refine is None:
            raise TautError(f"{self.id}: give keep or refine")
        return self.knobs.refine

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        knobs, limit, rank = self.knobs, min(site.rows, site.width), self._rank(site)
        if rank > limit and knobs.rank is not None:
            return f"rank {rank} is above that of {site.rows} x {site.width}: it may be at most {limit}"
        widths = {"subvector": knobs.subvector, "fine_subvector": knobs.fine_subvector if knobs.bits is None else 1}
        for name, width in widths.items():
            if rank % width:
                near = min(
                    (size for size in range(1, rank + 1) if rank % size == 0), key=lambda size: abs(size - width)
                )
                return f"{name} {width} does not divide the {rank} numbers of a row; the nearest that does is {near}"
        if site.rows < knobs.centroids:
            return f"{site.rows} rows are too few for {knobs.centroids} centroids; use centroids: 16, or another method"
        count = self._count(site)
        if knobs.bits is None and 0 < count < knobs.centroids:
            least = math.ceil(1000 * knobs.centroids / site.rows) / 1000
            return (
                f"refine {self.refine:.3g} is {count} rows, too few for {knobs.centroids} centroids; "
                f"give at least {least}"
            )
        return None

    def solve(self, site: TableSite, keep: float) -> "TwoStageEmbedding":
        """Choose the most refined rows whose total stored bytes are at most ``keep`` of the dense table's.

        Refines no row if these are too few to fit the second stage. Raises TautError if the first stage alone is
        larger.
        """
        budget = keep * site.dense().bytes
        most = bisect_right(range(site.rows + 1), budget, key=lambda count: self._at(site, count).predict(site).bytes)
        none = self._at(site, 0)
        if most == 0:
            least = none.predict(site).bytes / site.dense().bytes
            raise TautError(
                f"{self.id}: keep = {keep} is too little at {site.name} ({site.rows} x {site.width}): the first stage "
                f"alone takes {least:.2g}"
            )
        solved = self._at(site, most - 1)
        return solved if solved.fits(site) is None else none

    def predict(self, site: TableSite) -> Cost:
        layout, rank = self._layout(site), self._rank(site)
        stored = sum(math.prod(shape) for shape in layout.codes(site).values())
        for shape in layout.floats(site).values():
            stored += stored_bytes(shape, self.knobs.store, site.width_in_bytes)
        rotation = 0 if layout.rank is None else rank * site.width
        head = rotation + layout.first.multiplications(site.rows) + layout.fine.multiplications(layout.count)
        return Cost(site.rows * site.width, stored, 2.0 * (rotation + head * len(site.heads)))

    def _at(self, site: TableSite, count: int) -> "TwoStageEmbedding":
        return type(self)(self.knobs.model_copy(update={"refine": count / site.rows}))

    def _rank(self, site: TableSite) -> int:
        return self.knobs.rank or site.width

    def _count(self, site: TableSite) -> int:
        return round(self.refine * site.rows)

    def _layout(self, site: TableSite) -> Layout:
        knobs, rank = self.knobs, self._rank(site)
        first = Centroids(CodeLayout(rank, knobs.subvector, 1, knobs.centroids, shared=False))
        if knobs.bits is None:
            fine: RowCodes = Centroids(CodeLayout(rank, knobs.fine_subvector, 1, knobs.centroids, shared=False))
        else:
            fine = Numbers(RowFormat(knobs.bits, rank, min(knobs.group or rank, rank)))
        return Layout(first, fine, self._count(site), knobs.rank)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> TwoStageTable:
        """Build the part. From scratch, codes and codebooks are random, and the first rows of the table are refined."""
        part = TwoStageTable(site, self._layout(site), self.knobs.store, device, dtype)
        if device.type != "meta":
            self._start(part, site, device)
        return part

    def _start(self, part: TwoStageTable, site: TableSite, device: torch.device) -> None:
        rank = self._rank(site)
        if part.layout.rank is not None:
            part.fill("projection", nn.init.orthogonal_(torch.empty(rank, site.width, device=device)))
        unit = STANDARD_DEVIATION * LENGTH_ROOM * math.sqrt(site.width / rank)
        for name, share in (("codebook", 1.0), ("fine_codebook", FINE_SHARE)):
            if name in part.layout.floats(site):
                part.fill(name, torch.randn(part.layout.floats(site)[name], device=device) * unit * share)
        self._refine(part, torch.arange(site.rows, 0, -1, device=device))
        part.set_codes(torch.randn(site.rows, rank, device=device) * unit)
        table = torch.full((site.rows, 1), STANDARD_DEVIATION * math.sqrt(site.width), device=device)
        if site.padding_row is not None:
            table[site.padding_row] = 0
        part.set_lengths(table)

    @torch.no_grad()
    def fit(self, part: TwoStageTable, weight: Tensor, calibration: Calibration) -> None:
        """Fit directions, first-stage codes, the choice of refined rows, and second-stage codes, in that order.

        Rows are chosen by their squared residual times their importance. Each step uses the results of the earlier
        ones as they are stored. Raises TautError without calibration text, unless ``importance`` is error.
        """
        generator = torch.Generator().manual_seed(calibration.seed)
        share = self._share(part.num_embeddings, calibration).to(weight.device)
        layout = part.layout
        if layout.rank is not None:
            lengths = weight.double().norm(dim=1, keepdim=True)
            rows = weight.double() / torch.where(lengths > 0, lengths, 1.0)
            part.fill("projection", coding_basis(rows, share, layout.rank, self._groups(layout.rank)))
        points = part.points(weight)
        part.fill("codebook", layout.first.learn(points, share, generator))
        if layout.count:
            left = part.left(points)
            self._refine(part, left.double().square().sum(1) * share)
            rows = part.refined_rows
            book = layout.fine.learn(left[rows], share[rows], generator)
            if book is not None:
                part.fill("fine_codebook", book)
        part.set_codes(points)
        part.set_lengths(weight)

    def _groups(self, rank: int) -> int:
        """The number of groups for the directions: the subvectors of the stage with the shorter ones."""
        fine = self.knobs.fine_subvector if self.knobs.bits is None else self.knobs.subvector
        return rank // min(self.knobs.subvector, fine)

    def _refine(self, part: TwoStageTable, worth: Tensor) -> None:
        """Mark the ``count`` rows with the greatest ``worth`` (V,); of equal rows the first."""
        if part.layout.count:
            classes = torch.zeros(len(worth), dtype=torch.long, device=worth.device)
            classes[worth.argsort(descending=True, stable=True)[: part.layout.count]] = 1
            part.refined.copy_(pack_classes(classes, 2))

    def _share(self, rows: int, calibration: Calibration) -> Tensor:
        """The weights of the rows' errors, (V,) float32 with mean 1."""
        kind, seen = self.knobs.importance, calibration.frequency
        if kind == "error":
            return torch.ones(rows)
        statistic = seen if kind == "frequency" else calibration.sensitivity
        if statistic is None or seen is None:
            raise TautError(f"{self.id}: importance: {kind} needs calibration text; give some, or importance: error")
        once = 1.0 if kind == "frequency" else float((statistic[seen > 0] / seen[seen > 0]).median())
        share = (statistic.double() + UNSEEN * once) ** self.knobs.weighting
        return (share / share.mean()).float()

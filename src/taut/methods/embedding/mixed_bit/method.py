"""A token table whose rows have 2, 3, 4, 6 or 8 bits per number: more for rows that matter more on text."""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.embedding.mixed_bit.compensation import RECORD_BYTES, match, pack_records, unpack_records
from taut.methods.part import TablePart
from taut.ops.quantization.rowwise import RowFormat, lookup, pack, unpack
from taut.ops.quantization.tied_head import logits
from taut.ops.tables.allocation import allocate
from taut.ops.tables.bands import banded, map_bytes, pack_classes, places

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""
SPLIT, SPLIT_BITS = 0.3, (4, 8)
"""``bits: split`` keeps this share of the rows at 8 bits and the others at 4."""
UNSEEN = 0.5
"""This many occurrences of average importance are added to every row, so that unseen rows have some importance."""
TOKENS_PER_ROW = 0.25
"""The fewest calibration tokens per row. With fewer, almost all rows would be rounded without having been seen."""
SCALE_BYTES = 4


class MixedBitKnobs(Knobs):
    bits: Annotated[float, Field(gt=0, le=16)] | Literal["split"] | None = Field(
        None,
        description="average stored bits per number, scales and row map included; or split: 30 % of the rows at 8 "
        "bits, the others at 4 (5.2 on average, without scales and map); or give keep",
    )
    choices: tuple[Literal[2, 3, 4, 6, 8], ...] = Field(
        (2, 3, 4, 6, 8), min_length=1, description="the bits per number that a row may have"
    )
    importance: Literal["sensitivity", "gradient", "frequency", "none"] = Field(
        "sensitivity",
        description="what weights a row's rounding error: squared gradients (empirical Fisher), gradient norms or "
        "occurrences, each summed over calibration text; or nothing",
    )
    group: int | None = Field(None, ge=2, description="how many columns share a scale; none: the whole row")
    clip: bool = Field(True, description="clip a group's largest numbers if that lowers its squared error")
    compensate: bool = Field(
        False, description="add to each row with fewer bits the best multiple of one row with the most bits"
    )


@dataclass(frozen=True)
class Blocks:
    """Where rows are stored.

    ``classes`` (V,) and ``offsets`` (V,) are the class of every row and its rank in the class. ``rows`` lists the rows
    of each class. ``starts`` are the first bytes of the classes in ``weight``, ``record_starts`` those of their
    compensation, and last that of the scales of compensation. ``source`` and ``state`` identify the packed classes.
    """

    source: Tensor
    state: tuple[int, int]
    classes: Tensor
    offsets: Tensor
    rows: tuple[Tensor, ...]
    starts: tuple[int, ...]
    record_starts: tuple[int, ...]


class MixedBitTable(TablePart):
    """A token table of packed rows that differ in their bits per number.

    ``classes`` holds the index in ``layouts`` of every row, packed in whole bits. ``weight`` (1, N, 1) uint8 holds the
    rows class by class, packed as in ops.quantization.rowwise; its end may stay empty. N depends only on the budget, so
    the skeleton can be built before the bits of each row are chosen.

    Only while unpacked is something trainable: ``weight_unpacked`` (V, D) float32, from which codes are chosen. The
    bits of each row and what compensation adds do not change.
    """

    def __init__(
        self,
        site: TableSite,
        layouts: tuple[RowFormat, ...],
        size: int,
        clip: bool,
        compensate: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(site, dtype)
        self.layouts, self.clip, self.compensate = layouts, clip, compensate
        packed = map_bytes(site.rows, len(layouts))
        self.register_buffer("weight", torch.zeros((1, size, 1), dtype=torch.uint8, device=device))
        self.register_buffer("classes", torch.zeros(packed, dtype=torch.uint8, device=device))
        self.register_parameter("weight_unpacked", None)
        self._blocks: Blocks | None = None

    @property
    def blocks(self) -> Blocks:
        """The places of all rows, derived from ``classes`` and kept until they change. 13 bytes per row, not stored."""
        source = self.classes
        state = (source.data_ptr(), 0 if source.is_inference() else source._version)
        if self._blocks is None or self._blocks.source is not source or self._blocks.state != state:
            classes, offsets = places(source, len(self.layouts), self.num_embeddings)
            sizes = torch.bincount(classes, minlength=len(self.layouts)).tolist()
            rows = classes.long().argsort(stable=True).split(sizes)
            ends = [size * layout.row_bytes for size, layout in zip(sizes, self.layouts, strict=True)]
            starts = list(accumulate(ends, initial=0))
            records = list(accumulate((size * RECORD_BYTES for size in sizes[:-1]), initial=starts[-1]))
            self._blocks = Blocks(source, state, classes, offsets, rows, tuple(starts[:-1]), tuple(records))
        return self._blocks

    @torch.no_grad()
    def set_rows(self, table: Tensor, levels: Tensor) -> None:
        """Store the rows of ``table`` (V, D) float, each in the layout whose index is in ``levels`` (V,)."""
        self.classes.copy_(pack_classes(levels, len(self.layouts)))
        self.weight.zero_()
        rows = self.blocks.rows
        for kind in self._kinds():
            self._block(kind).copy_(pack(table[rows[kind]], self.layouts[kind], clip=self.clip))
        for kind in self._compensated():
            records, scale = pack_records(*match(table[rows[kind]] - self._rounded(kind), self._rounded(-1)))
            stored, stored_scale = self._records(kind)
            stored.copy_(records)
            stored_scale.copy_(scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D) of ``dtype``, times ``scale``.

        Raises IndexError for an id outside the table.
        """
        readers = [partial(self._read, kind) for kind in range(len(self.layouts))]
        blocks = self.blocks
        vectors = banded(ids, blocks.classes, blocks.offsets, readers, self.embedding_dim, self.dtype)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V), exact up to rounding.

        Works class by class and never expands the whole table, except while unpacked.
        """
        if self.weight_unpacked is not None:
            return F.linear(hidden, self.merged())
        scores = {kind: logits(hidden, self._block(kind), self.layouts[kind]) for kind in self._kinds()}
        for kind in self._compensated():
            lender, coefficient = unpack_records(*self._records(kind))
            lent = scores[len(self.layouts) - 1].index_select(-1, lender)
            scores[kind] = scores[kind] + lent * coefficient.to(hidden.dtype)
        order = torch.cat(self.blocks.rows)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return torch.cat([*scores.values()], dim=-1).index_select(-1, place)

    def merged(self) -> Tensor:
        """The dense table (V, D) of ``dtype``, without ``scale``."""
        table = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.weight.device)
        for kind in self._kinds():
            rows = self.blocks.rows[kind]
            table = table.index_copy(0, rows, self._read(kind, torch.arange(len(rows), device=rows.device)))
        return table

    def unpack(self, original: Tensor | None = None) -> None:
        super().unpack(original)
        start = torch.cat([self._rounded(kind) for kind in self._kinds()])
        start = torch.empty_like(start).index_copy_(0, torch.cat(self.blocks.rows), start)
        self.weight_unpacked = nn.Parameter(start if original is None else original.detach().to(start, copy=True))

    @torch.no_grad()
    def repack(self) -> None:
        super().repack()
        if self.weight_unpacked is not None:
            for kind in self._kinds():
                rows = self.weight_unpacked[self.blocks.rows[kind]]
                self._block(kind).copy_(pack(rows, self.layouts[kind], clip=self.clip))
            self.weight_unpacked = None

    def numbers(self) -> int:
        """Returns V D, the dense count, because each code stands for one number."""
        return self.num_embeddings * self.embedding_dim

    def average_bits(self, frequency: Tensor | None = None) -> float:
        """Stored bits per number, everything included.

        With ``frequency`` (V,), how often each row is looked up, it returns the average bits per number that lookups
        read. These include scales and the row's share of the map.
        """
        numbers = self.num_embeddings * self.embedding_dim
        if frequency is None:
            return 8 * sum(tensor.nbytes for tensor in (self.weight, self.classes)) / numbers
        last = len(self.layouts) - 1
        sizes = [layout.row_bytes for layout in self.layouts]
        sizes = [size + RECORD_BYTES * (self.compensate and kind < last) for kind, size in enumerate(sizes)]
        read = torch.tensor(sizes, dtype=torch.float64)[self.blocks.classes.long().cpu()] * 8
        share = frequency.double().cpu() / frequency.double().sum().cpu()
        return float(share @ read) / self.embedding_dim + 8 * self.classes.nbytes / numbers

    def extra_repr(self) -> str:
        bits = "/".join(str(layout.bits) for layout in self.layouts)
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={bits}, dtype={self.dtype}"

    def _kinds(self) -> list[int]:
        """The classes that have rows."""
        return [kind for kind, rows in enumerate(self.blocks.rows) if len(rows)]

    def _compensated(self) -> list[int]:
        """The classes whose rows are compensated by rows of the last class."""
        kinds = self._kinds() if self.compensate else []
        return kinds[:-1] if len(self.layouts) - 1 in kinds else []

    def _block(self, kind: int) -> Tensor:
        """The packed rows of a class: a view of (n, groups, bytes of a group)."""
        layout, start, count = self.layouts[kind], self.blocks.starts[kind], len(self.blocks.rows[kind])
        flat = self.weight.view(-1)[start : start + count * layout.row_bytes]
        return flat.view(count, layout.groups, layout.group_bytes)

    def _records(self, kind: int) -> tuple[Tensor, Tensor]:
        """The records of a class (n, bytes) and their scale, as views."""
        flat, starts = self.weight.view(-1), self.blocks.record_starts
        scale = starts[-1] + kind * SCALE_BYTES
        return flat[starts[kind] : starts[kind + 1]].view(-1, RECORD_BYTES), flat[scale : scale + SCALE_BYTES]

    def _rounded(self, kind: int) -> Tensor:
        """The decoded rows of a class without compensation: (n, D) float32."""
        return unpack(self._block(kind % len(self.layouts)), self.layouts[kind])

    def _read(self, kind: int, offsets: Tensor) -> Tensor:
        """Read rows by their ranks within a class: (n,) -> (n, D) of ``dtype``."""
        if not len(offsets):
            empty = self.weight.new_empty(0, self.embedding_dim, dtype=self.dtype)
            # An unpacked table joins every autograd graph, as dense tables do.
            return empty if self.weight_unpacked is None else empty + self.weight_unpacked[:0].to(self.dtype)
        vectors = self._look_up(kind, offsets)
        if kind in self._compensated():
            records, scale = self._records(kind)
            lender, coefficient = unpack_records(records.index_select(0, offsets), scale)
            lent = self._look_up(len(self.layouts) - 1, lender).detach()
            vectors = vectors + lent * coefficient.to(self.dtype)[:, None]
        return vectors

    def _look_up(self, kind: int, offsets: Tensor) -> Tensor:
        """``_read`` without compensation. While unpacked, gradients pass straight through the rounding."""
        layout, unpacked = self.layouts[kind], self.weight_unpacked
        if unpacked is None:
            return lookup(self._block(kind), offsets, layout, self.dtype)
        rows = F.embedding(self.blocks.rows[kind].index_select(0, offsets), unpacked, self.padding_idx)
        with torch.no_grad():
            rounding = unpack(pack(rows, layout, clip=self.clip), layout) - rows
        return (rows + rounding).to(self.dtype)


class MixedBitEmbedding(EmbeddingMethod):
    """Allocates bits to rows by sensitivity times measured rounding error. ``keep`` counts stored bytes."""

    id = "embedding.mixed_bit"
    summary = "2, 3, 4, 6 or 8 bits per number for each row, by its sensitivity times its rounding error, in one budget"
    source = (
        "Shoham and Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers: the allocation; Dong et "
        "al. 2020, HAWQ-V2 (arXiv 1911.03852): sensitivity times squared rounding error; nearest for tables: MPE "
        "(arXiv 2409.20305). Changed: rows of one table instead of layers or feature groups, the empirical Fisher "
        "information instead of the Hessian's trace, and a budget that counts scales and the row map"
    )
    Knobs = MixedBitKnobs
    dial = "bits"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.knobs.importance == "none" else frozenset({"frequency", self.knobs.importance})

    @cached_property
    def choices(self) -> tuple[int, ...]:
        return SPLIT_BITS if self.knobs.bits == "split" else tuple(sorted(set(self.knobs.choices)))

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        least = self._least(site)
        if self._size(site) >= least:
            return None
        bits = (least + map_bytes(site.rows, len(self.choices))) * 8 / (site.rows * site.width)
        return (
            f"bits {self.knobs.bits:.4g} are too few for {site.rows} x {site.width}: {self.choices[0]}-bit rows with "
            f"their scales and the row map need {bits:.4g}"
        )

    def solve(self, site: TableSite, keep: float) -> "MixedBitEmbedding":
        """Choose the average bits that ``keep`` allows, at most those of a table with the most bits in every row.

        Raises TautError if even the fewest bits need more.
        """
        numbers, place = site.rows * site.width, map_bytes(site.rows, len(self.choices))
        most = (site.rows * self._prices(site)[-1] + self._fixed() + place) * 8 / numbers
        method = type(self)(self.knobs.model_copy(update={"bits": min(keep * 8 * site.width_in_bytes, most)}))
        if method.fits(site) is not None:
            least = (self._least(site) + place) / site.dense().bytes
            raise TautError(f"{self.id}: keep = {keep} is too little at {site.name}: the least is {least:.4g}")
        return method

    def predict(self, site: TableSite) -> Cost:
        dense = site.dense()
        stored = self._size(site) + map_bytes(site.rows, len(self.choices))
        return Cost(dense.parameters, stored, dense.flops_per_token)

    def note(self, site: TableSite) -> str:
        stored = self.predict(site).bytes * 8 / (site.rows * site.width)
        if self.knobs.bits != "split" and stored < 0.99 * self.knobs.bits:
            return f"bits {self.knobs.bits:.4g} reduced to {stored:.4g}: every row has {self.choices[-1]}"
        basis = "rounding error alone" if self.knobs.importance == "none" else f"{self.knobs.importance} on text"
        return f"{stored:.4g} stored bits per number, scales and row map included; allocated to rows by {basis}"

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> MixedBitTable:
        layouts, knobs = self._layouts(site), self.knobs
        part = MixedBitTable(site, layouts, self._size(site), knobs.clip, knobs.compensate, device, dtype)
        if not part.weight.is_meta:
            start = torch.randn(site.rows, site.width, device=device) * STANDARD_DEVIATION
            if site.padding_row is not None:
                start[site.padding_row] = 0
            self._fill(part, start, torch.ones(site.rows, dtype=torch.float64))
        return part

    @torch.no_grad()
    def fit(self, part: MixedBitTable, weight: Tensor, calibration: Calibration) -> None:
        """Choose the bits of every row and pack ``weight`` (V, D).

        Raises TautError without calibration text or with too little of it, unless ``importance`` is none.
        """
        self._fill(part, weight, self._importance(part.num_embeddings, calibration))

    def _fill(self, part: MixedBitTable, weight: Tensor, importance: Tensor) -> None:
        table, layouts = weight.float(), part.layouts
        losses = []
        for layout in layouts:
            gap = unpack(pack(table, layout, clip=part.clip), layout).sub_(table)
            losses.append(gap.square_().sum(1).double().cpu() * importance / 2)
        prices = [layout.row_bytes + self._extra(kind) for kind, layout in enumerate(layouts)]
        budget = part.weight.nbytes - self._fixed()
        levels = allocate(torch.stack(losses, dim=1), torch.tensor(prices), budget)
        part.set_rows(table, levels.to(part.classes.device))

    def _importance(self, rows: int, calibration: Calibration) -> Tensor:
        """(V,) float64. An unseen row counts as half an occurrence of average importance, so that none is zero."""
        kind = self.knobs.importance
        if kind == "none":
            return torch.ones(rows, dtype=torch.float64)
        statistic = {"sensitivity": calibration.sensitivity, "gradient": calibration.gradient}.get(
            kind, calibration.frequency
        )
        if statistic is None or calibration.frequency is None:
            raise TautError(f"{self.id}: importance: {kind} needs calibration text; give some, or importance: none")
        total, seen = int(calibration.frequency.sum()), calibration.frequency > 0
        if total < TOKENS_PER_ROW * rows:
            raise TautError(
                f"{self.id}: {total} tokens of calibration text are too few for {rows} rows; give at least "
                f"{round(TOKENS_PER_ROW * rows)}, or importance: none"
            )
        once = (statistic[seen] / calibration.frequency[seen]).mean()
        return (statistic + UNSEEN * once).double().cpu()

    def _layouts(self, site: TableSite) -> tuple[RowFormat, ...]:
        group = min(self.knobs.group or site.width, site.width)
        return tuple(RowFormat(bits, site.width, group) for bits in self.choices)

    def _extra(self, kind: int) -> int:
        """Bytes of the compensation of a row in the class ``kind``."""
        return RECORD_BYTES if self.knobs.compensate and kind < len(self.choices) - 1 else 0

    def _fixed(self) -> int:
        return SCALE_BYTES * len(self.choices) if self.knobs.compensate else 0

    def _prices(self, site: TableSite) -> list[int]:
        """Bytes of a row for each of ``choices``."""
        return [layout.row_bytes + self._extra(kind) for kind, layout in enumerate(self._layouts(site))]

    def _least(self, site: TableSite) -> int:
        return site.rows * self._prices(site)[0] + self._fixed()

    def _size(self, site: TableSite) -> int:
        """Bytes of ``weight``: the budget without the row map, at most what the widest rows fill."""
        if self.knobs.bits is None:
            raise TautError(f"{self.id}: give keep or bits")
        prices = self._prices(site)
        if self.knobs.bits == "split":
            upper = int(SPLIT * site.rows)
            return upper * prices[1] + (site.rows - upper) * prices[0] + self._fixed()
        budget = int(self.knobs.bits * site.rows * site.width / 8) - map_bytes(site.rows, len(self.choices))
        return min(budget, site.rows * prices[-1] + self._fixed())

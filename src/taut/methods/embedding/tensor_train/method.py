"""A token table as a tensor train: a row is a product of K small matrices, shared by all rows with the same digit."""

import math
from bisect import bisect_left
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.embedding.tensor_train.bit_packing import bits_below, pack_integers, packed_bytes, read_integers
from taut.methods.embedding.tensor_train.fit import (
    clipped,
    column_factors,
    decompose,
    decompose_weighted,
    principal_order,
    refine,
    row_factors,
    within,
)
from taut.methods.embedding.tensor_train.kernel import Level, TrainShape, expand, prefixes, scores, vectors
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""
SHARED_FROM = 64
"""From this many ids on it pays to find the prefixes that they share."""
TOKENS_IN_A_CALL = 16
"""The predicted cost per token of a tied head assumes calls of this many tokens, which decide the cheaper way."""

MOST_TOKENS = 1 << 20
"""The most tokens of a call that ``note`` considers."""


class TensorTrainKnobs(Knobs):
    rank: int | tuple[int, ...] | None = Field(
        None, description="r_1 ... r_{K-1}: one number for all, or one each; reduced to useful ones; or give keep"
    )
    order: int = Field(3, ge=2, le=8, description="K, the number of cores")
    row_factors: tuple[int, ...] | None = Field(
        None, description="p_1 ... p_K, with a product of at least V; none: nearly equal ones with little padding"
    )
    column_factors: tuple[int, ...] | None = Field(
        None, description="q_1 ... q_K, with a product of exactly D; none: the most nearly equal ones"
    )
    columns: Literal["split", "whole"] = Field(
        "split", description="whole: the last core has all columns and no row digit, the others form a narrow table"
    )
    arrange: Literal["given", "frequency", "principal"] = Field(
        "given", description="order in which rows are numbered; any order but the given one is stored"
    )
    weighted: float = Field(
        0.0, ge=0, le=1, description="a row's squared error is weighted by (token count + 1) to this power"
    )
    hot: int = Field(0, ge=0, description="how many of the most frequent rows are kept dense")
    sweeps: int = Field(2, ge=0, description="rounds of least squares, core by core, after decomposition")
    store: Store | None = Field(None, description="keep cores and hot rows in fewer bits")


class TensorTrainTable(TablePart):
    """A token table whose rows are products of cores (see methods.embedding.tensor_train.kernel).

    The cores ``weight``, ``core_2``, ... ``core_K`` are (p_k, 1, r_{k-1} q_k r_k). ``hot_rows`` (C, D) replaces the
    rows of the cores for C tokens. ``places`` uint8 holds ceil(log2 V) bits per number: the position of every row in
    the train, hot rows first. In the given order it lists only the hot rows.
    """

    def __init__(
        self,
        site: TableSite,
        shape: TrainShape,
        hot: int,
        arranged: bool,
        store: Store | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(site, dtype)
        self.shape, self.hot, self.arranged, self.store = shape, hot, arranged, store
        self.bits = bits_below(site.rows)
        self.names = ("weight", *(f"core_{step}" for step in range(2, len(shape.rows) + 1)))
        for name, (count, *slice_shape) in zip(self.names, shape.cores, strict=True):
            self.hold(name, (count, 1, math.prod(slice_shape)), store, device)
        if hot:
            self.hold("hot_rows", (hot, site.width), store, device)
        listed = site.rows if arranged else hot
        if listed:
            places = torch.zeros(packed_bytes(listed, self.bits), dtype=torch.uint8, device=device)
            self.register_buffer("places", places)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), times ``scale``.

        Computes equal ids once, and equal prefixes of many ids too. Raises IndexError for an id outside the table (on
        CUDA the device asserts).
        """
        slots, inverse = torch.unique(self.slots(ids.reshape(-1)), return_inverse=True)
        rows = self.rows(slots, share=ids.numel() >= SHARED_FROM)
        if self.padding_idx is not None and rows.requires_grad:
            padding = slots == self.slots(torch.tensor([self.padding_idx], device=ids.device))
            rows = torch.where(padding[:, None], rows.detach(), rows)
        vectors = F.embedding(inverse, rows).view(*ids.shape, self.embedding_dim)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def slots(self, ids: Tensor) -> Tensor:
        """(n,) ids -> (n,) int64 slots: the number of a hot row (below C), or the position in the train plus C.

        Raises IndexError for an id outside the table (on a CPU, not compiled).
        """
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(ids):
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                worst = low if low < 0 else high
                raise IndexError(f"token id {worst} is out of range: the table has {self.num_embeddings} rows")
        ids = ids.long().contiguous()
        if self.arranged:
            position = read_integers(self.places, ids, self.bits)
            return torch.where(position < self.hot, position, position + self.hot)
        if not self.hot:
            return ids
        listed = self._hot_positions()
        number = torch.searchsorted(listed, ids).clamp_max(self.hot - 1)
        return torch.where(listed[number] == ids, number, ids + self.hot)

    def rows(self, slots: Tensor, share: bool) -> Tensor:
        """Compute the rows of sorted distinct slots: (n,) -> (n, D), without ``scale``."""
        if not self.hot:
            return self._from_cores(slots, share)
        count = int((slots < self.hot).sum())
        return torch.cat((self.held_rows("hot_rows", slots[:count]), self._from_cores(slots[count:] - self.hot, share)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V).

        Works block by block or core by core, whichever is less work for this number of hidden states.
        """
        by_slot = scores(hidden, self._cores(), self.shape, self.num_embeddings)
        if self.hot:
            by_slot = torch.cat((F.linear(hidden, self.held("hot_rows")), by_slot), dim=-1)
        return by_slot.index_select(-1, self._all_slots()) if self.hot or self.arranged else by_slot

    def merged(self) -> Tensor:
        """The dense table (V, D), without ``scale``."""
        rows = expand(self._cores())[: self.num_embeddings]
        if self.hot:
            rows = torch.cat((self.held("hot_rows"), rows))
        return rows.index_select(0, self._all_slots()) if self.hot or self.arranged else rows

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the hot rows to the values that the cores give them. After that they train independently."""
        if self.hot:
            self.fill("hot_rows", self._from_cores(self._hot_positions(), share=True))

    @torch.no_grad()
    def number(self, order: Tensor, hot: Tensor) -> None:
        """Store the order of the rows: ``order`` (V,) lists the rows by position.

        In the given order it stores only the hot rows ``hot`` (C,), which must be ascending.
        """
        if self.arranged:
            places = torch.empty_like(order)
            places[order] = torch.arange(len(order), device=order.device)
            self.places.copy_(pack_integers(places, self.bits))
        elif self.hot:
            self.places.copy_(pack_integers(hot, self.bits))

    def extra_repr(self) -> str:
        factors = f"rows={self.shape.rows}, columns={self.shape.columns}, ranks={self.shape.ranks}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {factors}, hot={self.hot}"

    def _hot_positions(self) -> Tensor:
        every = torch.arange(self.hot, device=self.places.device)
        return every if self.arranged else read_integers(self.places, every, self.bits)

    def _all_slots(self) -> Tensor:
        return self.slots(torch.arange(self.num_embeddings, device=self.places.device))

    def _from_cores(self, positions: Tensor, share: bool) -> Tensor:
        levels, cores = list(prefixes(positions, self.shape.rows, share)), []
        for step, (name, core_shape) in enumerate(zip(self.names, self.shape.cores, strict=True)):
            if self.store is None:
                core = self.held(name)
            else:
                # Expand only the slices in use.
                used, digits = torch.unique(levels[step].digits, return_inverse=True)
                levels[step], core = Level(digits, levels[step].parents), self.held_rows(name, used)
            cores.append(core.reshape(-1, *core_shape[1:]))
        return vectors(levels, cores)

    def _cores(self) -> list[Tensor]:
        return [self.held(name).view(core) for name, core in zip(self.names, self.shape.cores, strict=True)]


class TensorTrainEmbedding(EmbeddingMethod):
    """Decomposes the table by TT-SVD. ``keep`` counts its stored bytes: cores, hot rows and the stored order."""

    id = "embedding.tensor_train"
    summary = "a row is a product of small matrices, shared by rows with equal index digits (TT-SVD)"
    source = (
        "Hrinchuk et al. 2020 (arXiv 1901.10787): tables as tensor trains; Oseledets 2011: TT-SVD; Yin et al. 2021, "
        "TT-Rec (arXiv 2101.11714): dense rows beside the cores. Changed: rows may be reordered and weighted, least "
        "squares follow the decomposition, equal prefixes are computed once, dense rows are chosen once by count"
    )
    Knobs = TensorTrainKnobs
    dial = "rank"

    @property
    def needs(self) -> frozenset[str]:
        counts = self.knobs.weighted or self.knobs.hot or self.knobs.arrange == "frequency"
        return frozenset({"frequency"} if counts else ())

    @property
    def uncounted(self) -> str | None:
        return "the share of ids with hot rows depends on the text" if self.knobs.hot else None

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        try:
            cost = self.predict(site)
        except TautError as error:
            return str(error).removeprefix(f"{self.id}: ")
        dense = site.dense()
        if cost.parameters > dense.parameters or cost.bytes > dense.bytes:
            return f"{cost.bytes:,} bytes do not reduce {dense.bytes:,}: lower the rank or the number of hot rows"
        return None

    def solve(self, site: TableSite, keep: float) -> "TensorTrainEmbedding":
        """Choose the greatest uniform rank whose cores, hot rows and order take at most ``keep`` of the dense bytes."""
        rows, columns = self._factors(site)
        most = max(clipped(rows, columns, [site.rows * site.width] * (len(rows) - 1)))
        return self.greatest(site, keep, range(1, most + 1))

    def predict(self, site: TableSite) -> Cost:
        shape, knobs = self.shape(site), self.knobs
        tensors = [(count, rank * width) for count, rank, width in shape.cores]
        if knobs.hot:
            tensors.append((knobs.hot, site.width))
        numbers = sum(math.prod(tensor) for tensor in tensors)
        listed = knobs.hot if knobs.arrange == "given" else site.rows
        size = sum(stored_bytes(tensor, knobs.store, site.width_in_bytes) for tensor in tensors)
        size += packed_bytes(listed, bits_below(site.rows))
        head = shape.head_flops(site.rows, TOKENS_IN_A_CALL) / TOKENS_IN_A_CALL + 2 * knobs.hot * site.width
        return Cost(numbers, size, shape.lookup_flops() + head * len(site.heads))

    def note(self, site: TableSite) -> str | None:
        """The factors and ranks in use, and the way a tied head will be computed."""
        shape = self.shape(site)
        requested = self._ranks(len(shape.rows))
        notes = [
            f"rows {' x '.join(map(str, shape.rows))}, columns {' x '.join(map(str, shape.columns))}, "
            f"ranks {', '.join(map(str, shape.ranks))}"
        ]
        if shape.ranks != requested:
            notes.append(f"{', '.join(map(str, requested))} requested, reduced to the greatest useful ranks")
        if site.heads:
            notes.append(_head_in_words(shape, site.rows))
        return "; ".join(notes)

    def shape(self, site: TableSite) -> TrainShape:
        """Factors and ranks at this site. Raises TautError for factors that do not fit, and suggests some that do."""
        rows, columns = self._factors(site)
        return TrainShape(rows, columns, clipped(rows, columns, self._ranks(len(rows))))

    def ranks_within(
        self, site: TableSite, weight: Tensor, tolerance: float, calibration: Calibration
    ) -> tuple[int, ...]:
        """The least ranks at which TT-SVD alone keeps ||E - TT|| <= ``tolerance`` ||E||, for E (V, D) without hot rows.

        Pass them as ``rank``: a plan is made from shapes alone, before the weights are read. Raises TautError for a
        tolerance outside [0, 1), or when token counts are needed and there are none.
        """
        if not 0 <= tolerance < 1:
            raise TautError(f"{self.id}: tolerance = {tolerance}: expected at least 0 and below 1, such as 0.1")
        rows, columns = self._factors(site)
        order, hot = self._arrange(weight.detach(), rows, calibration)
        table, _ = self._placed(weight.detach(), order, hot, math.prod(rows), calibration)
        cores = decompose(table, rows, columns, within(tolerance, len(rows)))
        return tuple(core.shape[1] for core in cores[1:])

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> TensorTrainTable:
        """Build the part. The padding row starts like any other, because the cores cannot make a single row zero.

        Lookups of the padding row pass no gradient.
        """
        shape, knobs = self.shape(site), self.knobs
        part = TensorTrainTable(site, shape, knobs.hot, knobs.arrange != "given", knobs.store, device, dtype)
        if device.type != "meta":
            paths = math.prod(shape.ranks)
            deviation = (STANDARD_DEVIATION**2 / paths) ** (1 / (2 * len(shape.rows)))
            for name, core in zip(part.names, shape.cores, strict=True):
                part.fill(name, torch.randn(core, device=device) * deviation)
            order = torch.arange(site.rows, device=device)
            part.number(order, order[: knobs.hot])
            part.refresh()
        return part

    @torch.no_grad()
    def fit(self, part: TensorTrainTable, weight: Tensor, calibration: Calibration) -> None:
        """Decompose the arranged table, then run ``sweeps`` rounds of least squares.

        Positions beyond V and hot rows have no weight. Raises TautError when token counts are needed and there are
        none.
        """
        shape = part.shape
        order, hot = self._arrange(weight, shape.rows, calibration)
        table, weights = self._placed(weight, order, hot, shape.capacity, calibration)
        if self.knobs.weighted:
            cores = decompose_weighted(table, shape, weights)
        else:
            cores = decompose(table, shape.rows, shape.columns, lambda step, _: shape.ranks[step - 1])
        cores = refine(cores, table, weights, self.knobs.sweeps)
        for name, core in zip(part.names, cores, strict=True):
            part.fill(name, core)
        part.number(order, hot)
        if part.hot:
            part.fill("hot_rows", weight[hot])

    def _arrange(self, weight: Tensor, rows: tuple[int, ...], calibration: Calibration) -> tuple[Tensor, Tensor]:
        """The rows by position (V,), and the hot rows (C,), which come first unless the order is the given one."""
        original = torch.arange(len(weight), device=weight.device)
        if not self.needs:
            hot = original[:0]
        else:
            by_count = self._counts(weight, calibration).argsort(descending=True, stable=True)
            hot = by_count[: self.knobs.hot]
        if self.knobs.arrange == "given":
            return original, hot.sort().values
        return (by_count if self.knobs.arrange == "frequency" else principal_order(weight.float(), rows, hot)), hot

    def _placed(
        self, weight: Tensor, order: Tensor, hot: Tensor, capacity: int, calibration: Calibration
    ) -> tuple[Tensor, Tensor]:
        """The table by position (P, D), zero in rows without weight, and the weights of its rows (P,)."""
        table = weight.new_zeros(capacity, weight.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32))
        weights = table.new_zeros(capacity)
        counts = self._counts(weight, calibration).to(table) + 1 if self.knobs.weighted else table.new_ones(len(weight))
        importance = counts**self.knobs.weighted
        importance[hot] = 0
        weights[: len(order)] = (importance / importance.mean())[order]
        table[: len(order)] = weight[order].to(table)
        return table * (weights > 0)[:, None], weights

    def _counts(self, weight: Tensor, calibration: Calibration) -> Tensor:
        if calibration.frequency is None:
            raise TautError(
                f"{self.id}: weighted, hot and arrange: frequency need token counts; give calibration text or drop them"
            )
        return calibration.frequency.to(weight.device)

    def _factors(self, site: TableSite) -> tuple[tuple[int, ...], tuple[int, ...]]:
        knobs = self.knobs
        order = len(knobs.row_factors or knobs.column_factors or range(knobs.order))
        if order < 2:
            raise TautError(f"{self.id}: a tensor train needs at least two factors, not one")
        if knobs.columns == "whole":
            if knobs.row_factors or knobs.column_factors:
                raise TautError(
                    f"{self.id}: columns: whole sets the factors itself; drop it or row_factors and column_factors"
                )
            return (*row_factors(site.rows, order - 1), 1), (*(1,) * (order - 1), site.width)
        rows = knobs.row_factors or row_factors(site.rows, order)
        columns = knobs.column_factors or column_factors(site.width, order)
        enough, exact = math.prod(rows) >= site.rows, math.prod(columns) == site.width
        _check("row_factors", rows, row_factors(site.rows, order), enough, f"at least {site.rows}")
        _check("column_factors", columns, column_factors(site.width, order), exact, f"exactly {site.width}")
        return rows, columns

    def _ranks(self, order: int) -> tuple[int, ...]:
        rank = self.knobs.rank
        if rank is None:
            raise TautError(f"{self.id}: give keep or rank")
        ranks = (rank,) * (order - 1) if isinstance(rank, int) else rank
        if len(ranks) != order - 1 or min(ranks) < 1:
            raise TautError(f"{self.id}: rank {list(ranks)}: {order} cores need {order - 1} ranks of at least 1")
        return ranks


def _check(name: str, given: tuple[int, ...], nearest: tuple[int, ...], right: bool, wanted: str) -> None:
    if len(given) != len(nearest) or min(given) < 1 or not right:
        raise TautError(
            f"embedding.tensor_train: {name} {list(given)} make {math.prod(given)}; expected {len(nearest)} factors "
            f"that make {wanted}, such as {list(nearest)}"
        )


def _head_in_words(shape: TrainShape, count: int) -> str:
    """Say from how many hidden states on a tied head computes the rows first."""
    if not shape.expands(count, MOST_TOKENS):
        return "tied head: contracted core by core"
    least = bisect_left(range(1, MOST_TOKENS), True, key=lambda tokens: shape.expands(count, tokens)) + 1
    return f"tied head: rows computed once per call of {least} or more tokens; fewer are contracted core by core"

"""A token table in 8, 6, 4, 3 or 2 bits per number, integers or 4-bit floats, packed in memory and on disk."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.part import TablePart
from taut.ops.quantization.formats import BITS, NVFP4_TOP, number_format
from taut.ops.quantization.rowwise import RowFormat, lookup, pack, unpack
from taut.ops.quantization.tied_head import logits

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""


class LowBitKnobs(Knobs):
    bits: Literal[8, 6, 4, 3, 2] = Field(8, description="bits per number")
    number: Literal["int", "nf4", "fp4", "mxfp4", "nvfp4"] = Field(
        "int", description="number format: an integer between two ends, or with bits: 4 one of these floats"
    )
    symmetric: bool = Field(
        False,
        description="centre the range of each group of integers on zero, which is then exact; floats always do so",
    )
    group: int | None = Field(
        None,
        ge=2,
        description="how many columns share a scale; the last group may be shorter. None: the whole row for int, 64 "
        "for nf4 and fp4, and by definition 32 for mxfp4 and 16 for nvfp4",
    )
    clip: bool = Field(
        False, description="search the scale of each group for the least squared error (for fp4 as in LLM-FP4)"
    )


class LowBitTable(TablePart):
    """A token table of packed codes with a scale for each group of columns.

    ``weight`` (V, groups, bytes of a group) uint8 holds codes and scales (see ops.quantization.rowwise). NVFP4 also has
    a scale of the whole table, ``tensor_scale``: the four bytes of a float32.

    Only while unpacked is something trainable: ``weight_unpacked`` (V, D) float32, from which codes are chosen.
    Lookups return ``dtype``. It follows ``.to()``, ``.half()`` and similar calls although the part has no float tensor.
    """

    def __init__(
        self, site: TableSite, layout: RowFormat, knobs: LowBitKnobs, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, dtype)
        self.layout, self.symmetric, self.clip = layout, knobs.symmetric, knobs.clip
        shape = (site.rows, layout.groups, layout.group_bytes)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        scale = torch.empty(4, dtype=torch.uint8, device=device) if layout.number == "nvfp4" else None
        self.register_buffer("tensor_scale", scale)
        self.register_parameter("weight_unpacked", None)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D) of ``dtype``, times ``scale``.

        Raises IndexError for an id outside the table.
        """
        if self.weight_unpacked is not None:
            vectors = self._straight_through(F.embedding(ids, self.weight_unpacked, self.padding_idx)).to(self.dtype)
        elif self.tensor_scale is not None:
            vectors = (lookup(self.weight, ids, self.layout) * self._stored_scale).to(self.dtype)
        else:
            vectors = lookup(self.weight, ids, self.layout, self.dtype)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def reference(self, ids: Tensor) -> Tensor:
        """The same as ``forward``, computed from the whole dense table."""
        return self.merged()[ids] * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V), exact up to rounding.

        Never expands the whole table, except while unpacked.
        """
        if self.weight_unpacked is not None:
            return F.linear(hidden, self.merged())
        if self.tensor_scale is not None:
            # In float32: without the scale of the table, scores may exceed the range of half precision.
            scores = logits(hidden.float(), self.weight, self.layout)
            return (scores * self._stored_scale).to(hidden.dtype)
        return logits(hidden, self.weight, self.layout)

    def numbers(self) -> int:
        """Returns V D, the dense count, because each code stands for one number."""
        return self.num_embeddings * self.embedding_dim

    def merged(self) -> Tensor:
        """The dense table (V, D) of ``dtype``, without ``scale``."""
        table = self._expanded() if self.weight_unpacked is None else self._straight_through(self.weight_unpacked)
        return table.to(self.dtype)

    @torch.no_grad()
    def assign(self, table: Tensor) -> None:
        """Choose codes and scales for ``table`` (V, D) of any float dtype.

        Raises TautError for numbers that are not finite or beyond the range of a scale.
        """
        scale = self._tensor_scale(table)
        self.weight.copy_(pack(table if scale is None else table.float() / scale, *self._rounding()))
        if scale is not None:
            self.tensor_scale.copy_(scale.view(torch.uint8))

    def unpack(self, original: Tensor | None = None) -> None:
        super().unpack(original)
        start = self._expanded() if original is None else original.detach().to(self.weight.device)
        self.weight_unpacked = nn.Parameter(start.to(torch.float32, copy=True))

    def repack(self) -> None:
        super().repack()
        if self.weight_unpacked is not None:
            self.assign(self.weight_unpacked)
            self.weight_unpacked = None

    def extra_repr(self) -> str:
        layout = self.layout
        number = "" if layout.number == "int" else f", number={layout.number}"
        return (
            f"{self.num_embeddings}, {layout.width}, bits={layout.bits}{number}, group={layout.group}, "
            f"dtype={self.dtype}"
        )

    def _expanded(self) -> Tensor:
        """(V, D) float32."""
        table = unpack(self.weight, self.layout)
        return table if self.tensor_scale is None else table * self._stored_scale

    @property
    def _stored_scale(self) -> Tensor:
        # A copy, because a view as float32 needs an aligned start.
        return self.tensor_scale.clone().view(torch.float32)

    def _straight_through(self, rows: Tensor) -> Tensor:
        """Round ``rows`` (..., D) of ``weight_unpacked`` as storing would; gradients pass straight through."""
        with torch.no_grad():
            scale = self._tensor_scale(self.weight_unpacked)
            flat = rows.reshape(-1, self.layout.width)
            rounded = unpack(pack(flat if scale is None else flat / scale, *self._rounding()), self.layout)
            rounding = (rounded if scale is None else rounded * scale).view(rows.shape) - rows
        return rows + rounding

    def _rounding(self) -> tuple[RowFormat, bool, bool]:
        return self.layout, self.symmetric, self.clip

    def _tensor_scale(self, table: Tensor) -> Tensor | None:
        """Scale of the whole table, (1,) float32, that puts NVFP4's blocks in the range of their scales; else None."""
        if self.tensor_scale is None:
            return None
        largest = table.detach().float().abs().amax().view(1)
        return torch.where(largest > 0, largest / NVFP4_TOP, 1.0)


class LowBitEmbedding(EmbeddingMethod):
    """Rounds to nearest, with a scale for each row or group. ``keep`` counts stored bytes."""

    id = "embedding.low_bit"
    summary = "2 to 8 bits per number, integer or float, a scale for each row or group; lookups beat dense ones"
    source = (
        "Guan et al. 2019, Post-Training 4-bit Quantization on Embedding Tables (arXiv 1911.02079); nf4: Dettmers et "
        "al. 2023, QLoRA (arXiv 2305.14314); fp4: Liu et al. 2023, LLM-FP4 (arXiv 2310.16836); mxfp4: OCP "
        "Microscaling Formats 1.0; nvfp4: NVIDIA's format. Changed: scales may be shared by groups of columns, every "
        "format's scale search is a grid on the error of the table, and LLM-FP4's factors apply to the scale"
    )
    Knobs = LowBitKnobs
    dial = "bits"

    def fits(self, site: Site) -> str | None:
        knobs = self.knobs
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        if knobs.bits not in BITS[knobs.number]:
            return f"number: {knobs.number} needs bits: {BITS[knobs.number][0]}, not {knobs.bits}"
        form = number_format(knobs.number, knobs.bits)
        if knobs.symmetric and knobs.number != "int":
            return f"number: {knobs.number} is always centred on zero; drop symmetric"
        if knobs.group and form.fixed_group and knobs.group != form.usual_group:
            return f"number: {knobs.number} has groups of {form.usual_group} by definition, not {knobs.group}"
        if (knobs.group or 0) > site.width:
            return f"group {knobs.group} is wider than the table, {site.width}; drop it for one scale per row"
        return None

    def solve(self, site: TableSite, keep: float) -> "LowBitEmbedding":
        """Choose the most bits whose bytes, scales included, are at most ``keep`` of the dense table's.

        Raises TautError if none are.
        """
        for bits in BITS[self.knobs.number]:
            method = type(self)(self.knobs.model_copy(update={"bits": bits}))
            share = method.predict(site).bytes / site.dense().bytes
            if share <= keep:
                return method
        raise TautError(f"{self.id}: keep = {keep} is too little at {site.name}: the least is {share:.4g}")

    def predict(self, site: TableSite) -> Cost:
        dense = site.dense()
        tensor_scale = 4 if self.knobs.number == "nvfp4" else 0
        return Cost(dense.parameters, site.rows * self._layout(site).row_bytes + tensor_scale, dense.flops_per_token)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> LowBitTable:
        part = LowBitTable(site, self._layout(site), self.knobs, device, dtype)
        if not part.weight.is_meta:
            start = torch.randn(site.rows, site.width, device=device) * STANDARD_DEVIATION
            if site.padding_row is not None:
                start[site.padding_row] = 0
            part.assign(start)
        return part

    def fit(self, part: LowBitTable, weight: Tensor, calibration: Calibration) -> None:
        part.assign(weight)

    @property
    def bits(self) -> int:
        return self.knobs.bits

    def _layout(self, site: TableSite) -> RowFormat:
        form = number_format(self.knobs.number, self.bits)
        group = self.knobs.group or form.usual_group or site.width
        return RowFormat(self.bits, site.width, min(group, site.width), self.knobs.number)

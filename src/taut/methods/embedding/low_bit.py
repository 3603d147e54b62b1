"""A token table in 8 or 4 bits a number, packed in memory and on disk."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.kernels.rowwise import RowFormat, lookup, pack, unpack
from taut.kernels.tied_head import logits
from taut.methods.part import Calibration, EmbeddingMethod, Knobs, TablePart

STANDARD_DEVIATION = 0.02
"""Of the table that a part built from scratch starts as."""


class LowBitKnobs(Knobs):
    bits: Literal[8, 4] = Field(8, description="bits of a number")
    symmetric: bool = Field(False, description="centre the range of each group on zero, which is then exact")
    group: int | None = Field(None, ge=2, description="how many columns share a scale, a divisor of D; none: the row")
    clip: bool = Field(False, description="give up a group's largest numbers where that lowers its squared error")


class LowBitTable(TablePart):
    """``weight`` is (V, groups, bytes of a group) uint8: codes and scales (see kernels.rowwise). Nothing is trainable.

    Lookups come in ``dtype``, which follows ``.to()``, ``.half()`` and their like although no floating tensor is here.
    """

    def __init__(self, site: TableSite, layout: RowFormat, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(site, dtype)
        self.layout = layout
        shape = (site.rows, layout.groups, layout.group_bytes)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., D) of ``dtype``, times ``scale``. Raises IndexError for an id outside the table."""
        vectors = lookup(self.weight, ids, self.layout, self.dtype)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def reference(self, ids: Tensor) -> Tensor:
        """What ``forward`` computes, by the plain formula on the whole table."""
        return unpack(self.weight, self.layout).to(self.dtype)[ids] * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), exact up to rounding, without ever holding the dense table."""
        return logits(hidden, self.weight, self.layout)

    def numbers(self) -> int:
        """V D: a code stands for a number."""
        return self.num_embeddings * self.embedding_dim

    def merged(self) -> Tensor:
        """(V, D) of ``dtype``, without ``scale``."""
        return unpack(self.weight, self.layout).to(self.dtype)

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{self.num_embeddings}, {layout.width}, bits={layout.bits}, group={layout.group}, dtype={self.dtype}"


class LowBitEmbedding(EmbeddingMethod):
    """Round to nearest, a scale and a bias for each row or group. ``keep`` counts stored bytes."""

    id = "embedding.low_bit"
    summary = "8- or 4-bit codes with a scale for each row or group; the fused lookup is faster than the dense one"
    source = (
        "Guan et al. 2019, Post-Training 4-bit Quantization on Embedding Tables (arXiv 1911.02079). Changed: scales "
        "may be shared by groups of columns, and the clip search is a grid instead of greedy"
    )
    Knobs = LowBitKnobs
    dial = "bits"

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        group = self.knobs.group or site.width
        if site.width % group:
            divisors = [
                size for size in range(2, site.width + 1) if site.width % size == 0 and size * self.bits % 8 == 0
            ]
            close = min(divisors, key=lambda size: abs(size - group), default=None)
            return f"group {group} does not divide the width {site.width}; the nearest that does is {close}"
        if self.bits == 4 and group % 2:
            what = f"group {group}" if self.knobs.group else f"width {group}"
            return f"{what} is odd, and 4-bit numbers come in pairs; use bits: 8 or another group"
        return None

    def solve(self, site: TableSite, keep: float) -> "LowBitEmbedding":
        """The most bits whose bytes, scales included, are at most ``keep`` of the dense table's."""
        shares = {}
        for bits in (8, 4):
            method = type(self)(self.knobs.model_copy(update={"bits": bits}))
            if method.fits(site) is None:
                shares[bits] = method.predict(site).bytes / site.dense().bytes
                if shares[bits] <= keep:
                    return method
        least = f"the least is {min(shares.values()):.4g}" if shares else "no number of bits fits here"
        raise TautError(f"{self.id}: keep = {keep} is too little at {site.name}: {least}")

    def predict(self, site: TableSite) -> Cost:
        dense = site.dense()
        return Cost(dense.parameters, site.rows * self._layout(site).row_bytes, dense.flops_per_token)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> LowBitTable:
        part = LowBitTable(site, self._layout(site), device, dtype)
        if not part.weight.is_meta:
            start = torch.randn(site.rows, site.width, device=device) * STANDARD_DEVIATION
            if site.padding_row is not None:
                start[site.padding_row] = 0
            self.fit(part, start, Calibration())
        return part

    @torch.no_grad()
    def fit(self, part: LowBitTable, weight: Tensor, calibration: Calibration) -> None:
        part.weight.copy_(pack(weight, part.layout, self.knobs.symmetric, self.knobs.clip))

    @property
    def bits(self) -> int:
        return self.knobs.bits

    def _layout(self, site: TableSite) -> RowFormat:
        return RowFormat(self.bits, site.width, self.knobs.group or site.width)

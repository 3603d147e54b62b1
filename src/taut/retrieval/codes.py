"""Codes that store a unit vector in few bytes, and the scores of queries against coded vectors.

N coded documents are a tensor (N, ``row_bytes``) of bytes, or (N, W) of floats for ``Float``. A code only defines what
a row means; the index handles chunks, ranks and files.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError, nearest
from taut.ops.codebooks.gather import gather_rows
from taut.ops.codebooks.kmeans import kmeans
from taut.ops.codebooks.kmeans import nearest as nearest_centroids
from taut.ops.quantization.int8_linear import has_integer_product

CENTROIDS = 256
"""Centroids per codebook: one for each value of a byte."""
SUBVECTOR = 4
"""Dimensions per byte of a product code, unless ``bytes`` is given."""
FEW_QUERIES = 4
QUERIES_AT_ONCE = 32
"""The score tables of more queries than this do not fit into the processor's cache."""


class Code(ABC):
    """A way to store unit vectors of ``width`` W. Subclasses are final.

    ``scores`` are the inner products of float queries with the decoded rows, up to rounding.
    """

    name: ClassVar[str]

    def __init__(self, width: int, **fitted: Tensor) -> None:
        self.width = width
        self.fitted = fitted
        """The tensors that all rows share, by name: ranges, thresholds, codebooks. With ``width`` they rebuild the
        code."""

    @classmethod
    @abstractmethod
    def bytes_for(cls, width: int, wanted: int | None = None) -> int:
        """The bytes per vector: ``wanted``, or the code's default for None.

        Raises TautError if the code cannot use ``wanted`` bytes.
        """

    @classmethod
    @abstractmethod
    def fit(cls, vectors: Tensor, bytes: int | None, seed: int) -> Self:
        """Fit a code to ``vectors`` (N, W), N >= 1; it stores each in ``bytes_for(W, bytes)`` bytes."""

    @property
    def row_bytes(self) -> int:
        """Bytes per vector, without the tensors that all vectors share."""
        return self.bytes_for(self.width)

    @abstractmethod
    def encode(self, vectors: Tensor) -> Tensor:
        """(N, W) float32 vectors -> (N, -) rows to store."""

    @abstractmethod
    def decode(self, rows: Tensor) -> Tensor:
        """(N, -) rows -> (N, W) float32, the vectors that queries are scored against."""

    @abstractmethod
    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(Q, W) float32 queries, (n, -) rows -> (Q, n) float32 scores; higher is nearer."""

    def quick_scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Scores for choosing candidates: cheaper ones if the code has them, else those of ``scores``."""
        return self.scores(queries, rows)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.width, **{name: tensor.to(device) for name, tensor in self.fitted.items()})

    @classmethod
    def _only(cls, expected: int, wanted: int | None) -> int:
        if wanted not in (None, expected):
            raise TautError(
                f"code {cls.name}: bytes = {wanted}: expected {expected} for this width; only pq lets you choose"
            )
        return expected


class Float(Code):
    """Stores the vectors themselves, float32."""

    name = "float"

    @classmethod
    def bytes_for(cls, width: int, wanted: int | None = None) -> int:
        return cls._only(4 * width, wanted)

    @classmethod
    def fit(cls, vectors: Tensor, bytes: int | None, seed: int) -> Self:
        return cls(vectors.shape[1])

    def encode(self, vectors: Tensor) -> Tensor:
        return vectors.clone(memory_format=torch.contiguous_format)

    def decode(self, rows: Tensor) -> Tensor:
        return rows

    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        return queries @ rows.T


class Int8(Code):
    """One byte per number: 255 equally spaced levels over the range that its dimension had when the code was fitted.

    Each dimension has its own middle and range. Many decoders have a dimension in which all vectors are large and
    alike; it does not make the other dimensions coarser. Queries are rounded to 16 bits and multiplied as integers.
    """

    name = "int8"

    @classmethod
    def bytes_for(cls, width: int, wanted: int | None = None) -> int:
        return cls._only(width, wanted)

    @classmethod
    def fit(cls, vectors: Tensor, bytes: int | None, seed: int) -> Self:
        low, high = vectors.aminmax(dim=0)
        step = (high - low) / 254
        return cls(vectors.shape[1], middle=(high + low) / 2, step=torch.where(step > 0, step, 1.0))

    def encode(self, vectors: Tensor) -> Tensor:
        return ((vectors - self.fitted["middle"]) / self.fitted["step"]).round_().clamp_(-127, 127).to(torch.int8)

    def decode(self, rows: Tensor) -> Tensor:
        return torch.addcmul(self.fitted["middle"], rows.float(), self.fitted["step"])

    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        scaled, offset = queries * self.fitted["step"], (queries @ self.fitted["middle"])[:, None]
        if rows.device.type != "cpu" or not has_integer_product():
            return torch.addmm(offset, scaled, rows.float().T)
        # Two digits to the base 255 represent a query in 16 bits; one digit would round as coarsely as the rows.
        unit = scaled.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / (127 * 255)
        whole = (scaled / unit).round_()
        high = (whole / 255).round_()
        digits = torch.cat((high, whole - 255 * high)).to(torch.int8)
        high, low = torch._int_mm(digits, rows.T).float().chunk(2)
        return torch.addcmul(offset, torch.add(low, high, alpha=255), unit)


class Binary(Code):
    """One bit per number: whether it exceeds the median of its dimension. Earlier numbers are lower bits.

    ``scores`` subtract the medians from the float query as well, and multiply it with +1 and -1 divided by sqrt(W).
    ``quick_scores`` also reduce the query to bits: 1 - 2 * (bits that differ) / W.
    """

    name = "binary"

    @classmethod
    def bytes_for(cls, width: int, wanted: int | None = None) -> int:
        return cls._only(-(-width // 8), wanted)

    @classmethod
    def fit(cls, vectors: Tensor, bytes: int | None, seed: int) -> Self:
        return cls(vectors.shape[1], threshold=vectors.median(dim=0).values)

    def encode(self, vectors: Tensor) -> Tensor:
        bits = _cut(F.pad(vectors > self.fitted["threshold"], (0, -self.width % 8)), self.row_bytes)
        return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2, dtype=torch.uint8)

    def decode(self, rows: Tensor) -> Tensor:
        return _signs(rows.device)[rows.int()].flatten(1)[:, : self.width] / self.width**0.5

    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        centred = _cut(F.pad(queries - self.fitted["threshold"], (0, -self.width % 8)), self.row_bytes)
        return summed_by_table(centred @ _signs(rows.device).T / self.width**0.5, rows)

    def quick_scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        return hamming(self.encode(queries), rows).float().mul_(-2 / self.width).add_(1)


class ProductQuantized(Code):
    """One byte per subvector: the index of the nearest of up to 256 centroids, fitted by k-means for each place.

    Source: Jegou, Douze and Schmid 2011 (product quantisation, asymmetric distances), here for inner products.
    """

    name = "pq"

    @classmethod
    def bytes_for(cls, width: int, wanted: int | None = None) -> int:
        places = -(-width // SUBVECTOR) if wanted is None else wanted
        if places < 1 or width % places:
            closest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - places))
            raise TautError(f"code pq: bytes = {places} does not divide the width {width}; the nearest is {closest}")
        return places

    @classmethod
    def fit(cls, vectors: Tensor, bytes: int | None, seed: int) -> Self:
        width = vectors.shape[1]
        places = cls.bytes_for(width, bytes)
        points = _cut(vectors, places).transpose(0, 1).contiguous()
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:CENTROIDS]
        codebooks, _, _ = kmeans(points, points.new_ones(len(vectors)), points[:, chosen.to(points.device)])
        return cls(width, codebooks=codebooks)

    @property
    def row_bytes(self) -> int:
        return self.fitted["codebooks"].shape[0]

    def encode(self, vectors: Tensor) -> Tensor:
        points = _cut(vectors, self.row_bytes).transpose(0, 1).contiguous()
        return nearest_centroids(points, self.fitted["codebooks"])[0].T.to(torch.uint8).contiguous()

    def decode(self, rows: Tensor) -> Tensor:
        codebooks = self.fitted["codebooks"]
        starts = torch.arange(self.row_bytes, dtype=torch.int32, device=rows.device) * codebooks.shape[1]
        return gather_rows((rows + starts).view(-1), codebooks.flatten(0, 1)).view(len(rows), self.width)

    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        split = _cut(queries, self.row_bytes)
        return summed_by_table(torch.einsum("qpw,pcw->qpc", split, self.fitted["codebooks"]), rows)


CODES: dict[str, type[Code]] = {code.name: code for code in (Float, Int8, Binary, ProductQuantized)}


def code_named(name: str) -> type[Code]:
    """The code called ``name``. Raises TautError that names the nearest code if there is none."""
    if name not in CODES:
        raise TautError(f"unknown code {name!r}: {nearest(name, CODES)}")
    return CODES[name]


def summed_by_table(tables: Tensor, rows: Tensor) -> Tensor:
    """Sum table entries: (Q, P, C) float32 tables and (n, P) uint8 codes -> (Q, n) sums.

    A table holds one number for each of C codes at each of P places. Takes Q * P additions per row and no
    multiplication; extra memory O(n * (P + Q)).
    """
    count, places, size = tables.shape
    indices = rows.int() + torch.arange(places, dtype=torch.int32, device=rows.device) * size
    if count < FEW_QUERIES:
        # embedding_bag reads one vector over all queries per code; with few queries a plain gather is faster.
        flat = indices.view(-1)
        sums = [table.reshape(-1)[flat].view(len(rows), places).sum(1) for table in tables]
        return torch.stack(sums) if sums else tables.new_empty(0, len(rows))
    blocks = tables.flatten(1).split(QUERIES_AT_ONCE)
    return torch.cat([F.embedding_bag(indices, block.T.contiguous(), mode="sum") for block in blocks], dim=1).T


def hamming(first: Tensor, second: Tensor) -> Tensor:
    """Count the bits that differ: (Q, P) and (n, P) uint8 -> (Q, n) int32.

    On a CPU, numpy counts 64 bits at a time with the processor's own instruction. Extra memory O(n * P + result).
    """
    if first.device.type != "cpu":
        signs = _signs(first.device)
        products = signs[first.int()].flatten(1) @ signs[second.int()].flatten(1).T
        return ((8 * first.shape[1] - products) / 2).round_().int()
    if first.shape[1] % 8:
        first, second = (F.pad(side, (0, -side.shape[1] % 8)) for side in (first, second))
    queries, rows = first.numpy().view(np.uint64), second.numpy().view(np.uint64)
    # Put the words of one place next to each other, so that the sum over places runs along contiguous memory.
    words = np.ascontiguousarray(rows.T)
    counts = np.empty((len(queries), len(rows)), dtype=np.int32)
    for query, out in zip(queries, counts, strict=True):
        np.bitwise_count(words ^ query[:, None]).sum(axis=0, dtype=np.int32, out=out)
    return torch.from_numpy(counts)


def _cut(vectors: Tensor, places: int) -> Tensor:
    """Split vectors into equal parts: (N, W) -> (N, ``places``, W / ``places``)."""
    return vectors.reshape(len(vectors), places, vectors.shape[1] // places)


def _signs(device: torch.device) -> Tensor:
    """(256, 8) float32: +1 if the bit of the byte is set, else -1; lowest bit first."""
    values = torch.arange(256, device=device)[:, None]
    return ((values >> torch.arange(8, device=device)) & 1).float() * 2 - 1

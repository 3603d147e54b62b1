"""How a unit vector is kept in few bytes, and how queries are scored against what is kept.

N documents are a tensor (N, ``row_bytes``) of bytes, or (N, W) of floats for ``Float``. A code decides only what a row
means; chunks, ranks and files are the index's business.
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
from taut.ops.quantization.int8_linear import integer_product_is_exact

CENTROIDS = 256
"""One for each value of a byte."""
SUBVECTOR = 4
"""Numbers that share a byte of a product code unless ``bytes`` says otherwise."""
FEW_QUERIES = 4
QUERIES_AT_ONCE = 32
"""Tables of more queries than this leave the cache."""


class Code(ABC):
    """A way to keep unit vectors of ``width`` W. Subclasses are final.

    ``scores`` are inner products of float queries with ``decode`` of the rows, up to rounding.
    """

    name: ClassVar[str]

    def __init__(self, width: int, **fitted: Tensor) -> None:
        self.width = width
        self.fitted = fitted
        """What all rows share, by name: ranges, thresholds, codebooks. With ``width`` it rebuilds the code."""

    @classmethod
    @abstractmethod
    def bytes_for(cls, width: int, wanted: int | None = None) -> int:
        """Bytes of a vector. Raises TautError where it cannot have the ``wanted``; None is the code's own choice."""

    @classmethod
    @abstractmethod
    def fit(cls, vectors: Tensor, bytes: int | None, seed: int) -> Self:
        """The code for vectors like these (N, W), N >= 1, of ``bytes_for(W, bytes)`` each."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector, without what all vectors share."""
        return self.bytes_for(self.width)

    @abstractmethod
    def encode(self, vectors: Tensor) -> Tensor:
        """(N, W) float32 -> (N, -), the rows kept."""

    @abstractmethod
    def decode(self, rows: Tensor) -> Tensor:
        """(N, -) rows -> (N, W) float32, what a query meets."""

    @abstractmethod
    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(Q, W) float32 queries, (n, -) rows -> (Q, n) float32, higher is nearer."""

    def quick_scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Cheaper scores to choose candidates by, where there are any."""
        return self.scores(queries, rows)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.width, **{name: tensor.to(device) for name, tensor in self.fitted.items()})

    @classmethod
    def _only(cls, expected: int, wanted: int | None) -> int:
        if wanted not in (None, expected):
            raise TautError(f"code {cls.name}: bytes = {wanted}: it has {expected} here; only pq lets you choose")
        return expected


class Float(Code):
    """The vectors themselves, float32."""

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
    """A byte for each number: 255 equal steps over the range that its dimension had when the code was fitted.

    The range of each dimension lies around its own middle, so a dimension in which all vectors are large and alike, as
    many decoders have, costs the others nothing. Queries are rounded to 16 bits and multiplied in integers.
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
        if rows.device.type != "cpu" or not integer_product_is_exact():
            return torch.addmm(offset, scaled, rows.float().T)
        # Two digits to the base 255 make a query of 16 bits; one alone would round as coarsely as the rows.
        unit = scaled.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / (127 * 255)
        whole = (scaled / unit).round_()
        high = (whole / 255).round_()
        digits = torch.cat((high, whole - 255 * high)).to(torch.int8)
        high, low = torch._int_mm(digits, rows.T).float().chunk(2)
        return torch.addcmul(offset, torch.add(low, high, alpha=255), unit)


class Binary(Code):
    """A bit for each number: whether it exceeds the median of its dimension. The earlier number is the lower bit.

    A float query meets +1 and -1, divided by sqrt(W), after the medians are taken off it too. ``quick_scores`` take the
    signs of the query instead: 1 - 2 * (bits that differ) / W.
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
    """A byte for each subvector: the nearest of up to 256 centroids, found by k-means for each place of its own.

    Source: Jegou, Douze and Schmid 2011 (product quantisation, asymmetric distances), for inner products.
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
    """Raises TautError naming the nearest code when there is none of this name."""
    if name not in CODES:
        raise TautError(f"unknown code {name!r}: {nearest(name, CODES)}")
    return CODES[name]


def summed_by_table(tables: Tensor, rows: Tensor) -> Tensor:
    """(Q, P, C) float32 tables, one number for each of C codes at each of P places; (n, P) codes uint8 -> (Q, n) sums.

    Q * P additions a row and no product; extra memory O(n * (P + Q)).
    """
    count, places, size = tables.shape
    indices = rows.int() + torch.arange(places, dtype=torch.int32, device=rows.device) * size
    if count < FEW_QUERIES:
        # A bag reads a whole vector of queries for each code: with few of them the plain gather is faster.
        flat = indices.view(-1)
        found = [table.reshape(-1)[flat].view(len(rows), places).sum(1) for table in tables]
        return torch.stack(found) if found else tables.new_empty(0, len(rows))
    blocks = tables.flatten(1).split(QUERIES_AT_ONCE)
    return torch.cat([F.embedding_bag(indices, block.T.contiguous(), mode="sum") for block in blocks], dim=1).T


def hamming(first: Tensor, second: Tensor) -> Tensor:
    """(Q, P) and (n, P) uint8 -> (Q, n) int32: how many bits differ.

    On a CPU 64 bits at a time, with the processor's own count of bits (numpy's). Extra memory O(n * P + result).
    """
    if first.device.type != "cpu":
        signs = _signs(first.device)
        products = signs[first.int()].flatten(1) @ signs[second.int()].flatten(1).T
        return ((8 * first.shape[1] - products) / 2).round_().int()
    if first.shape[1] % 8:
        first, second = (F.pad(side, (0, -side.shape[1] % 8)) for side in (first, second))
    queries, rows = first.numpy().view(np.uint64), second.numpy().view(np.uint64)
    # Words of one place side by side, so that adding up goes along them.
    words = np.ascontiguousarray(rows.T)
    found = np.empty((len(queries), len(rows)), dtype=np.int32)
    for query, out in zip(queries, found, strict=True):
        np.bitwise_count(words ^ query[:, None]).sum(axis=0, dtype=np.int32, out=out)
    return torch.from_numpy(found)


def _cut(vectors: Tensor, places: int) -> Tensor:
    """(N, W) -> (N, ``places``, W / ``places``)."""
    return vectors.reshape(len(vectors), places, vectors.shape[1] // places)


def _signs(device: torch.device) -> Tensor:
    """(256, 8) float32: +1 where the bit of a byte is set, else -1; the lowest bit first."""
    values = torch.arange(256, device=device)[:, None]
    return ((values >> torch.arange(8, device=device)) & 1).float() * 2 - 1

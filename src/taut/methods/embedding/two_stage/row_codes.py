"""Two ways to store rows in few bytes, with one interface: codes of centroids, and rounded numbers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taut.ops.codebooks import product_codes
from taut.ops.codebooks.product_codes import CodeLayout
from taut.ops.codebooks.search import assign, decode, search
from taut.ops.quantization import rowwise, tied_head
from taut.ops.quantization.rowwise import RowFormat


class RowCodes(ABC):
    """Abstract format of rows of R numbers. ``book`` is a float tensor of ``book_shape``, or None if that is None."""

    book_shape: tuple[int, ...] | None

    @abstractmethod
    def shape(self, count: int) -> tuple[int, int, int]:
        """Shape of the uint8 tensor that stores ``count`` rows."""

    @abstractmethod
    def multiplications(self, count: int) -> int:
        """Multiplications of ``scores`` against ``count`` rows, for one token."""

    @abstractmethod
    def learn(self, rows: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor | None:
        """Fit a book to (n, R) float32 rows whose errors are weighted by ``weight`` (n,). None if there is no book."""

    @abstractmethod
    def encode(self, rows: Tensor, book: Tensor | None) -> Tensor:
        """Pack rows: (n, R) float32 -> uint8 of ``shape(n)``."""

    @abstractmethod
    def rounded(self, rows: Tensor, book: Tensor | None) -> Tensor:
        """The rows as encoding and reading would return them: (n, R) -> (n, R), differentiable in ``book`` only."""

    @abstractmethod
    def read(self, packed: Tensor, ids: Tensor, book: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Read rows: (n,) ids -> (n, R) of ``dtype``, differentiable in ``book``.

        Raises IndexError for an id outside ``packed``.
        """

    @abstractmethod
    def scores(self, hidden: Tensor, packed: Tensor, book: Tensor | None) -> Tensor:
        """Products with all rows: (T, R) -> (T, n), without expanding the rows."""


@dataclass(frozen=True)
class Centroids(RowCodes):
    """Product codes (ops.codebooks.product_codes) of one stage. A row of the book is the codebook of one subvector."""

    layout: CodeLayout

    @property
    def book_shape(self) -> tuple[int, int]:
        return self.layout.positions, self.layout.centroids * self.layout.subvector

    def shape(self, count: int) -> tuple[int, int, int]:
        return count, 1, self.layout.stage_bytes

    def multiplications(self, count: int) -> int:
        return self.layout.centroids * self.layout.width if count else 0

    def learn(self, rows: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
        _, books = search(rows, weight, None, self.layout, generator)
        return books.reshape(self.book_shape)

    def encode(self, rows: Tensor, book: Tensor) -> Tensor:
        return self.layout.pack(assign(rows, self._books(book).float(), self.layout))

    def rounded(self, rows: Tensor, book: Tensor) -> Tensor:
        books = self._books(book)
        return decode(assign(rows.detach().float(), books.detach().float(), self.layout), books)

    def read(self, packed: Tensor, ids: Tensor, book: Tensor, dtype: torch.dtype) -> Tensor:
        return product_codes.lookup(packed, ids, self._books(book), self.layout).to(dtype)

    def scores(self, hidden: Tensor, packed: Tensor, book: Tensor) -> Tensor:
        return product_codes.scores(hidden, packed, self._books(book), self.layout)

    def _books(self, book: Tensor) -> Tensor:
        """The book in the shape that ops.codebooks.product_codes expects: (1, R / w, C, w)."""
        return book.view(1, self.layout.positions, self.layout.centroids, self.layout.subvector)


@dataclass(frozen=True)
class Numbers(RowCodes):
    """Rounded numbers with scales (ops.quantization.rowwise), without a book."""

    layout: RowFormat
    book_shape: ClassVar[None] = None

    def shape(self, count: int) -> tuple[int, int, int]:
        return count, self.layout.groups, self.layout.group_bytes

    def multiplications(self, count: int) -> int:
        return count * self.layout.width

    def learn(self, rows: Tensor, weight: Tensor, generator: torch.Generator) -> None:
        return None

    def encode(self, rows: Tensor, book: None) -> Tensor:
        return rowwise.pack(rows, self.layout, clip=True)

    def rounded(self, rows: Tensor, book: None) -> Tensor:
        return rowwise.unpack(self.encode(rows.detach(), book), self.layout).to(rows.dtype)

    def read(self, packed: Tensor, ids: Tensor, book: None, dtype: torch.dtype) -> Tensor:
        return rowwise.lookup(packed, ids, self.layout, dtype)

    def scores(self, hidden: Tensor, packed: Tensor, book: None) -> Tensor:
        return tied_head.logits(hidden, packed, self.layout)

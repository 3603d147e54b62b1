"""The attention mask of segments of equal length that also see a fixed number of earlier tokens."""

from dataclasses import dataclass

from torch import Tensor

from taut.ops.attention.masks import Pattern


@dataclass(frozen=True)
class Recurrence(Pattern):
    """j <= i and j >= floor(i / segment) segment - memory: a query sees its own segment so far, and the ``memory``
    tokens before that segment.

    This is no sliding window: the last token of a segment sees more tokens than its first, and all of them see back to
    the same token.
    """

    segment: int
    memory: int

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = query[..., :, None], key[..., None, :]
        return (key <= query) & (key >= query - query % self.segment - self.memory)

    def pairs(self, length: int) -> int:
        whole, rest = divmod(length, self.segment)
        within = whole * (self.segment * (self.segment + 1) // 2) + rest * (rest + 1) // 2
        # Segments whose memory reaches back to the first token.
        early = min(whole, self.memory // self.segment + 1)
        before = self.segment * (early * (early - 1) // 2) + (whole - early) * self.memory
        return within + self.segment * before + rest * min(whole * self.segment, self.memory)

    @property
    def repeats_from(self) -> int:
        return self.segment + self.memory

    @property
    def period(self) -> int:
        return self.segment

    @property
    def band(self) -> tuple[int, int]:
        return self.segment + self.memory, 0

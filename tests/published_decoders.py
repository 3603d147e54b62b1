"""Parameters and FLOPs of the decoders of Wei et al. 2024 (arXiv 2406.16450), from sizes alone: a formula to test with.

A multiply-add is two FLOPs. All score pairs of causal attention count, and so does the output head; biases and norms
do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

from taut.training.flops import TRAINING, matched_share

Numbers = Callable[[int, int], int]
"""The parameters of a map, by its inputs and outputs; also its multiply-adds for a token."""


def dense_map(inputs: int, outputs: int) -> int:
    return inputs * outputs


def low_rank_map(rank: int) -> Numbers:
    """U (outputs, R) V (R, inputs)."""
    return lambda inputs, outputs: rank * (inputs + outputs)


def block_dense_map(blocks: int, rank: int) -> Numbers:
    """U (outputs, R) after B blocks (R / B, inputs / B)."""
    return lambda inputs, outputs: rank * (inputs // blocks + outputs)


def block_shuffle_map(blocks: int) -> Numbers:
    """B blocks, a shuffle, B blocks; the square ones on the narrow side."""
    return lambda inputs, outputs: min(inputs, outputs) * (inputs + outputs) // blocks


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder with a tied table and plain two-map feed-forward blocks of which the first stays dense.

    ``width`` h, ``inner`` f, ``attention`` the width a of all query heads together (None: h), ``key_heads`` of
    ``heads`` for grouped queries (None: all), ``context`` the tokens of a sequence.
    """

    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 32_000
    context: int = 1024
    attention: int | None = None
    key_heads: int | None = None

    @property
    def queries(self) -> int:
        return self.attention or self.width

    @property
    def keys(self) -> int:
        return self.queries // self.heads * (self.key_heads or self.heads)

    def feedforward(self, numbers: Numbers = dense_map) -> int:
        """Weights of all feed-forward maps, the first layer's dense; biases apart."""
        dense = 2 * self.width * self.inner
        return dense + (self.layers - 1) * (numbers(self.width, self.inner) + numbers(self.inner, self.width))

    def parameters(self, numbers: Numbers = dense_map) -> int:
        """Everything: table, maps, biases, and two norms a layer and one at the end, with scale and shift."""
        attention = 2 * self.width * (self.queries + self.keys)
        biases = self.inner + 2 * self.width + self.queries + 2 * self.keys
        norms = (2 * self.layers + 1) * 2 * self.width
        table = self.vocabulary * self.width
        return table + self.feedforward(numbers) + self.layers * (attention + biases) + norms

    def forward_flops(self, numbers: Numbers = dense_map) -> int:
        """For one token."""
        maps = self.layers * 2 * self.width * (self.queries + self.keys) + self.vocabulary * self.width
        scores = 4 * self.layers * self.context * self.queries
        return 2 * (self.feedforward(numbers) + maps) + scores

    def training_flops(self, tokens: float, numbers: Numbers = dense_map) -> float:
        return float(TRAINING * self.forward_flops(numbers) * tokens)

    def guide_flops(self, tokens: float) -> float:
        """Of dense guides beside every structured map, computed each time."""
        return float(TRAINING * 2 * (self.layers - 1) * 2 * self.width * self.inner * tokens)

    def guided_share(self, numbers: Numbers) -> float:
        """The share of the steps to guide for the FLOPs of dense training; see ``matched_share``."""
        dense, structured = self.training_flops(1.0), self.training_flops(1.0, numbers)
        return matched_share(dense, structured, self.guide_flops(1.0))

"""What training costs, from sizes alone: no model, no torch.

The accounting of Wei et al. 2024 (arXiv 2406.16450): a multiply-add is two FLOPs, the backward pass twice the forward
one, all score pairs of causal attention count, the output head counts, biases and norms do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward pass: one product for the inputs, one for the weights."""
TRAINING = 1 + BACKWARD
USE = 0.5
"""How often a stochastic guide is computed over its phase: the mean of either schedule."""

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


def matched_share(dense: float, structured: float, guide: float, use: float = USE) -> float:
    """rho, the share of the steps to guide and then to repeat unguided so that all costs what dense training would:
    (F_dense - F_structured) / (F_structured + use F_guide), of the FLOPs of equally many tokens."""
    return (dense - structured) / (structured + use * guide)

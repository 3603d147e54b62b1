"""Pooling of several cache entries into one: by a fixed rule, or by maps that a memory method has learned.

Each key head of each layer learns one map for its keys and one for its values. A map returns the mean of the group
plus a learned addition, which starts at zero. It is trained by the loss of the model, or by the error that attention
makes when it sees compressed entries instead of the old ones.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pool = Callable[[Tensor], Tensor]
"""From (B, H', G, rate, K) to (B, H', G, K)."""
POOLS: dict[str, Pool] = {"mean": lambda groups: groups.mean(3), "max": lambda groups: groups.amax(3)}


class Reduction(nn.Module, ABC):
    """Abstract: a learned pool of one layer, for its keys or for its values, with ``weight`` of this ``shape``."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    @staticmethod
    @abstractmethod
    def shape(heads: int, rate: int, width: int) -> tuple[int, ...]:
        """The shape of the weight, for groups of ``rate`` rows of ``width`` numbers in each of ``heads`` heads."""

    @staticmethod
    @abstractmethod
    def products(heads: int, rate: int, width: int) -> int:
        """Multiply-adds for one group, summed over the heads."""

    @staticmethod
    @abstractmethod
    def addition(groups: Tensor, weight: Tensor) -> Tensor:
        """Groups (B, H', G, rate, K) -> the addition to the mean, (B, H', G, K)."""

    def forward(self, groups: Tensor, frozen: bool = False) -> Tensor:
        """(B, H', G, rate, K) -> (B, H', G, K). If ``frozen``, the gradient reaches the groups but not the weight."""
        return groups.mean(3) + self.addition(groups, self.weight.detach() if frozen else self.weight)


class Convolution(Reduction):
    """A convolution over time, as wide as its stride: any linear map from the rows of a group to one row."""

    @staticmethod
    def shape(heads: int, rate: int, width: int) -> tuple[int, ...]:
        return heads, rate * width, width

    @staticmethod
    def products(heads: int, rate: int, width: int) -> int:
        return heads * rate * width**2

    @staticmethod
    def addition(groups: Tensor, weight: Tensor) -> Tensor:
        return groups.flatten(3) @ weight


class DilatedConvolutions(Reduction):
    """Causal convolutions of two taps at distances 1, 2, 4, ..., each h[t] + gelu(A h[t] + B h[t - distance]). The
    result is read at the last row of a group. Zeros stand before a group's first row.

    Outputs that no later level reads are not computed: each level merges pairs of rows into one, until one is left.
    """

    @staticmethod
    def shape(heads: int, rate: int, width: int) -> tuple[int, ...]:
        return _levels(rate), heads, 2 * width, width

    @staticmethod
    def products(heads: int, rate: int, width: int) -> int:
        return heads * (2 ** _levels(rate) - 1) * 2 * width**2

    @staticmethod
    def addition(groups: Tensor, weight: Tensor) -> Tensor:
        rows = F.pad(groups, (0, 0, 2 ** len(weight) - groups.shape[3], 0))
        for level in weight:
            # ``level`` has one map per head, which all groups of that head share.
            rows = rows[..., 1::2, :] + F.gelu(rows.unflatten(3, (-1, 2)).flatten(4) @ level[:, None])
        return rows[..., 0, :] - groups[..., -1, :]


REDUCTIONS: dict[str, type[Reduction]] = {"conv": Convolution, "dilated": DilatedConvolutions}


class Compressor(nn.Module):
    """The learned pools of all layers of one memory."""

    def __init__(
        self, pool: str, layers: int, heads: int, rate: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        kind = REDUCTIONS[pool]
        shape = kind.shape(heads, rate, width)
        self.keys = nn.ModuleList(kind(shape, device, dtype) for _ in range(layers))
        self.values = nn.ModuleList(kind(shape, device, dtype) for _ in range(layers))
        self.errors: list[Tensor] | None = None

    def pools(self, layer: int) -> tuple[Pool, Pool]:
        """The pools of this layer, for keys and for values."""
        frozen = self.errors is not None
        return partial(self.keys[layer], frozen=frozen), partial(self.values[layer], frozen=frozen)

    @contextmanager
    def reconstructing(self) -> Iterator[list[Tensor]]:
        """In this context, forward passes append to the list the ``attention_error`` of each layer that compresses
        something. The gradient of these errors reaches only the learned pools, and no other gradient reaches them."""
        self.errors = errors = []
        try:
            yield errors
        finally:
            self.errors = None

    def compare(self, layer: int, query: Tensor, groups: tuple[Tensor, Tensor], seen: Tensor, scaling: float) -> None:
        """Append the ``attention_error`` of these queries. ``groups`` are keys and values, (B, H', G, rate, K) each."""
        keys, values = (tensor.detach() for tensor in groups)
        pooled = self.keys[layer](keys), self.values[layer](values)
        self.errors.append(attention_error(query.detach(), (keys, values), pooled, seen, scaling))


def attention_error(
    query: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], seen: Tensor, scaling: float
) -> Tensor:
    """The mean squared difference between attention to compressed entries and to the old ones, a scalar.

    Queries (B, H, T, K); ``old`` keys and values (B, H', G, rate, K), ``new`` ones (B, H', G, K). ``seen`` (B or 1, T,
    G) bool marks the groups that each query sees. Queries that see none do not count. There is no mask within a group
    and no bias by distance.
    """
    counted = seen.any(2).expand(query.shape[0], -1)
    # A query without any group would divide by zero. It sees all groups here and is left out below.
    mask = (seen | ~seen.any(2, keepdim=True))[:, None]
    grouped = query.shape[1] != new[0].shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    rate = old[0].shape[3]
    before = attend(query, *(tensor.flatten(2, 3) for tensor in old), attn_mask=mask.repeat_interleave(rate, 3))
    missed = before - attend(query, *new, attn_mask=mask)
    missed = missed.to(torch.promote_types(missed.dtype, torch.float32)).square().mean((1, 3))
    return (missed * counted).sum() / counted.sum().clamp(min=1)


def numbers(pool: str, heads: int, rate: int, width: int) -> int:
    """How many numbers one layer learns, keys and values together."""
    return 2 * math.prod(REDUCTIONS[pool].shape(heads, rate, width))


def products(pool: str, heads: int, rate: int, width: int) -> int:
    """Multiply-adds of one layer for one group, keys and values together."""
    return 2 * REDUCTIONS[pool].products(heads, rate, width)


def _levels(rate: int) -> int:
    """How many of the distances 1, 2, 4, ... it takes to reach from the last row of a group to its first."""
    return (rate - 1).bit_length()

"""Attention of a whole text at once, under masks that a slow rule gives every layer and head: what caches equal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from taut.methods.store import Store
from taut.ops.attention.blocked import reference
from taut.ops.caches.quantized import rounded

Rule = Callable[[Tensor, Tensor, float], Tensor]
"""(B, H, T, K) queries, (B, H', T, K) keys, scaling -> (B, H, T, T) bool: who sees whom."""


def by_heads(one_head: Callable[[Tensor, Tensor, float], Tensor], query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, T, K), (B, H', T, K) -> (B, H, T, T): what ``one_head`` says of each key head and its queries."""
    batch, heads, length, _ = query.shape
    group = heads // key.shape[1]
    allowed = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        for head in range(key.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            allowed[row, mine] = one_head(query[row, mine], key[row, head], scaling)
    return allowed


@dataclass(frozen=True)
class Evicting:
    """The entries that stay, one at a time. ``score``: norm, accumulated or last; ``chunks``: how the text came in."""

    score: str
    entries: int
    recent: int
    chunks: list[int]
    dropped: set[tuple[int, ...]] = field(default_factory=set)

    def __call__(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        return by_heads(self._one_head, query, key, scaling)

    def _one_head(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """(G, T, K), (T, K) -> (T, T)."""
        allowed = torch.zeros(len(key), len(key), dtype=torch.bool)
        held: list[int] = []
        worth = dict.fromkeys(range(len(key)), 0.0)
        if self.score == "norm":
            worth = {place: -float(vector.norm().bfloat16()) for place, vector in enumerate(key)}
        for stop, count in zip(accumulate(self.chunks), self.chunks, strict=True):
            for place in range(stop - count, stop):
                held.append(place)
                allowed[place, held] = True
                if self.score == "last":
                    worth = dict.fromkeys(worth, 0.0)
                if self.score != "norm":
                    weights = (query[:, place] @ key[held].T * scaling).softmax(-1).sum(0)
                    for other, weight in zip(held, weights.tolist(), strict=True):
                        worth[other] += weight
            surplus = len(held) - self.entries
            if surplus > 0:
                candidates = held[: len(held) - self.recent]
                gone = sorted(candidates, key=lambda place: (worth[place], place))[:surplus]
                self.dropped.add(tuple(gone))
                held = [place for place in held if place not in gone]
        return allowed


@contextmanager
def slowly(model: PreTrainedModel, rule: Rule, store: Store | None = None) -> Iterator[None]:
    """Causal attention of ``model`` follows ``rule``, on keys and values rounded as ``store`` says; others see all."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **options: Any
    ) -> tuple[Tensor, None]:
        allowed = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if module.is_causal:
            if store is not None:
                key, value = rounded(key, store), rounded(value, store)
            allowed = rule(query, key, scaling)
        return reference(query, key, value, allowed, scaling=scaling, position_bias=options.get("position_bias")), None

    AttentionInterface.register("slow", attention)
    AttentionMaskInterface.register("slow", lambda **options: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("slow")
    yield
    model.set_attn_implementation(before)

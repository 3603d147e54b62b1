"""Attention to compressed entries as the definition says it: every query gathers and compresses what it sees."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from taut.contract.tiny import logits
from taut.methods.memory.compressive.method import Compressive
from taut.ops.caches.pooling import Compressor
from taut.ops.caches.quantized import rounded

Slow = Callable[[Tensor, Tensor | None], Tensor]
"""(B, H', rate, K) and a weight -> (B, H', K)."""


def convolved(group: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's convolution, head by head: kernel and stride are the rate."""
    rate, width = group.shape[2:]
    out = []
    for head, own in enumerate(weight):
        kernel = own.view(rate, width, width).permute(2, 1, 0)
        out.append(F.conv1d(group[:, head].transpose(1, 2), kernel, stride=rate)[..., 0])
    return group.mean(2) + torch.stack(out, 1)


def dilated(group: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's dilated convolutions over the whole group, zeros before it, of which the last answer is taken."""
    width, out = group.shape[3], []
    for head in range(group.shape[1]):
        rows = group[:, head].transpose(1, 2)
        for level, own in enumerate(weight[:, head]):
            kernel = own.view(2, width, width).permute(2, 1, 0)
            rows = rows + F.gelu(F.conv1d(F.pad(rows, (2**level, 0)), kernel, dilation=2**level))
        out.append(rows[..., -1] - group[:, head, -1])
    return group.mean(2) + torch.stack(out, 1)


SLOW: dict[str, Slow] = {
    "mean": lambda group, weight: group.mean(2),
    "max": lambda group, weight: group.max(2).values,
    "conv": convolved,
    "dilated": dilated,
}


def visible(i: int, knobs) -> tuple[list[int], list[int]]:
    """The groups and the tokens that a query at i sees, straight from the definition."""
    groups = max(0, i // knobs.segment * knobs.segment - knobs.memory) // knobs.rate
    return list(range(max(0, groups - knobs.compressed), groups)), list(range(groups * knobs.rate, i + 1))


def slow_reference(
    model: PreTrainedModel, method: Compressive, ids: Tensor, compressor: Compressor | None = None
) -> Tensor:
    """Logits of a pass without a cache of taut's. A store rounds what comes in, and rounds what is made of it again."""
    knobs, pool = method.knobs, SLOW[method.knobs.pool]

    def stored(states: Tensor) -> Tensor:
        return states if knobs.store is None else rounded(states, knobs.store)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, **rest: object
    ) -> tuple[Tensor, None]:
        share, out = query.shape[1] // key.shape[1], []
        key, value = stored(key), stored(value)
        weights = (None, None)
        if compressor is not None:
            weights = tuple(pools[module.layer_idx].weight for pools in (compressor.keys, compressor.values))
        for i in range(query.shape[2]):
            groups, tokens = visible(i, knobs)
            seen = []
            for held, weight in zip((key, value), weights, strict=True):
                whole = [held[:, :, g * knobs.rate : (g + 1) * knobs.rate] for g in groups]
                pooled = [stored(pool(group, weight)[:, :, None])[:, :, 0] for group in whole]
                entries = torch.stack([*pooled, *(held[:, :, j] for j in tokens)], 2)
                seen.append(entries.repeat_interleave(share, 1))
            scores = torch.einsum("bhk,bhsk->bhs", query[:, :, i], seen[0]) * scaling
            out.append(torch.einsum("bhs,bhsk->bhk", scores.softmax(-1), seen[1]))
        return torch.stack(out, 1), None

    AttentionInterface.register("slow_compressive", attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = "slow_compressive"
    try:
        return logits(model, input_ids=ids, use_cache=False)
    finally:
        model.config._attn_implementation = before
        del AttentionInterface._global_mapping["slow_compressive"]

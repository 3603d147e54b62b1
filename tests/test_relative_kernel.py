"""The kernel of attention.relative: the formula entry by entry, in blocks, with gaps, and its gradients and FLOPs."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taut.core.site import AttentionSite
from taut.methods.attention.relative import kernel
from taut.methods.attention.relative.method import Relative
from taut.methods.base import LEARNED
from taut.methods.memory.segment_recurrence.mask import Recurrence
from taut.ops.attention.masks import Pattern, Sink, View

EXACT = 1e-12


def naive(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, apart: Tensor, learned: dict, clamp: int | None):
    """Entry by entry: ``seen`` and ``apart`` (query minus key) are (B, T, S)."""
    (batch, heads, queries, width), key_heads = query.shape, key.shape[1]
    across = heads * width
    w = learned["weight"].view(key_heads, width, across)
    u, v = (learned[name].view(heads, width) for name in ("content_bias", "distance_bias"))
    out = torch.zeros(batch, queries, heads, width, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // key_heads)
            for i in range(queries):
                scores = []
                for j in range(key.shape[2]):
                    d = float(apart[b, i, j])
                    d = d if clamp is None else max(-clamp, min(clamp, d))
                    angles = [d / 10000.0 ** (2 * n / across) for n in range(across // 2)]
                    r = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=query.dtype)
                    q = query[b, h, i]
                    score = (q + u[h]) @ key[b, shared, j] + (q + v[h]) @ (w[shared] @ r)
                    scores.append(score / math.sqrt(width) if seen[b, i, j] else torch.tensor(-math.inf).to(query))
                out[b, i, h] = torch.stack(scores).softmax(0) @ value[b, shared]
    return out


def tensors(queries: int, keys: int, key_heads: int, batch: int = 2) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    generator = torch.Generator().manual_seed(queries + 100 * keys)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, width = 4, 6
    learned = {
        "weight": random(key_heads * width, heads * width) * 0.3,
        "content_bias": random(heads * width),
        "distance_bias": random(heads * width),
    }
    states = (random(batch, heads, queries, width), *(random(batch, key_heads, keys, width) for _ in range(2)))
    return states, learned


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("clamp", [None, 3])
@pytest.mark.parametrize("rows", [2, 5, 100])
@pytest.mark.parametrize(("queries", "before", "causal"), [(9, 0, True), (9, 0, False), (7, 4, True), (1, 8, True)])
def test_the_formula_entry_by_entry(
    key_heads: int, clamp: int | None, rows: int, queries: int, before: int, causal: bool
) -> None:
    keys = before + queries
    states, learned = tensors(queries, keys, key_heads)
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1, -2 if not causal else 0] = False
    if causal and before == 0:
        padding[1, 0] = True  # A query that sees nothing means nothing.
    view = View(2, queries, keys, query_start=before, causal=causal, padding=padding)
    apart = (torch.arange(queries)[:, None] + before - torch.arange(keys)).expand(2, -1, -1)
    seen = padding[:, None] & ((apart >= 0) | (not causal))
    result = kernel.attend(*states, view, clamp=clamp, rows=rows, **learned)
    assert (result - naive(*states, seen, apart, learned, clamp)).abs().max() <= EXACT


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("clamp", [None, 6])
def test_a_cache_with_gaps_knows_its_distances(queries: int, clamp: int | None) -> None:
    held = torch.tensor([[0, 1, 9, 7, 8], [0, -1, 5, 6, 4]])
    new = torch.tensor([[10], [7]]) + torch.arange(queries)
    positions = torch.cat([held, new], 1)
    states, learned = tensors(queries, positions.shape[1], 2)
    starts = torch.tensor([0, 3])
    view = View(2, queries, positions.shape[1], 10, causal=True, starts=starts, key_positions=positions)
    apart = new[:, :, None] - positions[:, None]
    seen = (positions[:, None] >= 0) & (apart >= 0)
    result = kernel.attend(*states, view, clamp=clamp, **learned)
    assert (result - naive(*states, seen, apart, learned, clamp)).abs().max() <= EXACT


@pytest.mark.parametrize("pattern", [Recurrence(4, 3), Recurrence(5, 0), Sink(2, 6)])
@pytest.mark.parametrize("before", [0, 6])
def test_blocks_within_the_band_of_a_memory_are_all_that_is_needed(pattern: Pattern, before: int) -> None:
    states, learned = tensors(20, 20 + before, 2)
    view = View(2, 20, 20 + before, query_start=before, causal=True, pattern=pattern)
    apart = (torch.arange(20)[:, None] + before - torch.arange(20 + before)).expand(2, -1, -1)
    seen = view.block(slice(None), slice(None), torch.device("cpu"))[0].expand(2, -1, -1)
    expected = naive(*states, seen, apart, learned, None)
    for rows in (1, 3, 7, 64):
        assert (kernel.attend(*states, view, rows=rows, **learned) - expected).abs().max() <= EXACT


@pytest.mark.parametrize("queries", [1, 5])
def test_gradients_of_states_and_of_what_is_learned(queries: int) -> None:
    states, learned = tensors(queries, 5, 2, batch=1)
    leaves = [tensor.requires_grad_() for tensor in (*states, *learned.values())]
    view = View(1, queries, 5, query_start=5 - queries, causal=True)

    def answer(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        return kernel.attend(query, key, value, view, rows=2, **dict(zip(learned, rest, strict=True)))

    assert torch.autograd.gradcheck(answer, leaves)


def test_distances_are_taken_in_float32() -> None:
    far = torch.tensor([100_003])
    exact = kernel.sinusoid(far, 64, torch.float64)
    assert (kernel.sinusoid(far, 64, torch.bfloat16).double() - exact).abs().max() < 0.02
    assert kernel.sinusoid(far, 7, torch.float32).shape == (1, 7)


@pytest.mark.parametrize(("length", "causal"), [(64, True), (64, False), (300, False)])
def test_what_surrounds_the_fused_call_costs_what_is_predicted(length: int, causal: bool) -> None:
    site = AttentionSite(
        slot="attention", path="x", heads=4, key_heads=2, head_width=16, causal=causal, position="none", length=length
    )
    method, module = Relative(), nn.Module()
    module.add_module(LEARNED, method.learned(site, torch.device("cpu"), torch.float32))
    states = (torch.randn(1, 4, length, 16), *(torch.randn(1, 2, length, 16) for _ in range(2)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        method.attend(module, *states, View(1, length, length, causal=causal))
    # The counter does not see the fused call on a CPU.
    counted = counter.get_total_flops() / length + site.flops(float(length) ** 2)
    assert method.predict(site).flops_per_token == pytest.approx(counted, rel=0.02)

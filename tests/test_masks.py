"""Patterns agree with their formulas, and views with transformers' own masks."""

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from taut.methods.memory.segment_recurrence.mask import Recurrence
from taut.ops.attention.masks import AnyOf, Causal, Global, Pattern, Sink, View, Window

CPU = torch.device("cpu")
PATTERNS = (
    Causal(),
    Window(1),
    Window(3),
    Window(40),
    Window(1, causal=False),
    Window(4, causal=False),
    Window(40, causal=False),
    Global(0),
    Global(2),
    Global(40),
    Sink(0, 3),
    Sink(2, 1),
    Sink(3, 4),
    Sink(30, 4),
    Recurrence(1, 0),
    Recurrence(4, 0),
    Recurrence(4, 3),
    Recurrence(3, 7),
    Recurrence(5, 40),
    AnyOf((Window(3, causal=False), Global(2))),
)


def _by_hand(pattern: Pattern, i: int, j: int) -> bool:
    match pattern:
        case Causal():
            return j <= i
        case Window(width, True):
            return 0 <= i - j < width
        case Window(width, False):
            return abs(i - j) < width
        case Global(count):
            return i < count or j < count
        case Sink(count, window):
            return j <= i and (j < count or i - j < window)
        case Recurrence(segment, memory):
            return j <= i and j >= i // segment * segment - memory
        case AnyOf(members):
            return any(_by_hand(member, i, j) for member in members)
    raise AssertionError(pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pattern_is_its_formula(pattern: Pattern) -> None:
    for length in (1, 2, 7, 17):
        positions = torch.arange(length)
        mask = pattern.allowed(positions, positions)
        by_hand = [[_by_hand(pattern, i, j) for j in range(length)] for i in range(length)]
        assert mask.tolist() == by_hand
        assert pattern.pairs(length) == int(mask.sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_settled_blocks_look_alike(pattern: Pattern) -> None:
    start = pattern.repeats_from
    first, second = (torch.arange(6) + start + offset for offset in (0, 9 * pattern.period))
    assert torch.equal(pattern.allowed(first, first), pattern.allowed(second, second))
    leading = torch.arange(3)
    assert torch.equal(pattern.allowed(first + 3, leading)[0], pattern.allowed(second + 3, leading)[0])


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern.band is not None], ids=str)
def test_a_band_holds_all_that_is_seen(pattern: Pattern) -> None:
    positions = torch.arange(60)
    outside = ~Sink(pattern.band[1], pattern.band[0]).allowed(positions, positions)
    assert not (pattern.allowed(positions, positions) & outside).any()


def test_sink_is_window_or_first_tokens_in_a_decoder() -> None:
    positions = torch.arange(20)
    assert torch.equal(
        Sink(3, 5).allowed(positions, positions),
        Causal().allowed(positions, positions) & AnyOf((Window(5), Global(3))).allowed(positions, positions),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "past"), [(6, 0), (1, 5), (3, 4)])
@pytest.mark.parametrize("pads", [0, 2])
def test_view_is_the_mask_of_transformers(causal: bool, queries: int, past: int, pads: int) -> None:
    keys = queries + past
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1, :pads] = False
    expected = sdpa_mask(
        2,
        queries,
        keys,
        past,
        0,
        causal_mask_function if causal else bidirectional_mask_function,
        attention_mask=padding if pads else None,
        allow_is_causal_skip=causal,
        allow_is_bidirectional_skip=not causal,
    )
    view = View(
        2,
        queries,
        keys,
        query_start=past,
        causal=causal,
        padding=padding if pads else None,
        starts=torch.tensor([0, pads]) if pads else None,
    )
    ours = view.dense(CPU)
    assert (ours is None) == (expected is None)
    if expected is not None:
        assert torch.equal(ours.expand(2, 1, queries, keys), expected.expand(2, 1, queries, keys))


def test_patterns_count_from_the_first_real_token() -> None:
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :3] = False
    view = View(2, 9, 9, causal=True, padding=padding, starts=torch.tensor([0, 3]), pattern=Sink(2, 2))
    alone = View(1, 6, 6, causal=True, pattern=Sink(2, 2))
    assert torch.equal(view.dense(CPU)[1, :, 3:, 3:], alone.dense(CPU)[0])
    assert not view.dense(CPU)[1, :, :, :3].any()


def test_block_is_a_part_of_the_whole() -> None:
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, 10:] = False
    view = View(2, 12, 12, causal=True, padding=padding, pattern=Sink(1, 4))
    whole = view.dense(CPU, Window(3))
    part = view.block(slice(4, 9), slice(2, 11), CPU, Window(3))
    assert torch.equal(part, whole[:, :, 4:9, 2:11])


def test_gaps_and_empty_entries() -> None:
    positions = torch.tensor([[0, 5, 6, -1], [0, 1, 2, 3]])
    view = View(2, 1, 4, query_start=6, causal=True, starts=torch.tensor([0, 3]), key_positions=positions)
    assert view.dense(CPU)[:, 0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_rule_sees_true_positions() -> None:
    view = View(
        2, 4, 4, causal=True, starts=torch.tensor([0, 1]), rule=lambda b, h, q, k: (q // 2 == k // 2) & (b >= 0)
    )
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(view.block(slice(None), slice(None), CPU)[1, 0], expected)


def test_one_query_that_sees_everything_needs_no_mask() -> None:
    assert View(1, 1, 5, query_start=4, causal=True, pattern=Sink(2, 3)).dense(CPU) is None
    assert View(1, 1, 6, query_start=5, causal=True, pattern=Sink(2, 3)).dense(CPU) is not None

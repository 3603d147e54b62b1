"""How records become rows, gaps and words: every rule with numbers worked by hand."""

import math

import pytest
from sample_records import DATA, record, spec

from taut.core.record import Quantity, Record, Score
from taut.studies.protocol import (
    COSTS,
    NOISE,
    UNKNOWN,
    Cell,
    Column,
    Gap,
    Row,
    _cost_gap,
    _ratio_word,
    _score_word,
    cost_keys,
    role_of,
    score_keys,
    summary,
)
from taut.studies.selection import behind_front
from taut.studies.study import IDENTITY

ITEMS = [0.1, 0.9, 0.4, 0.6, 0.2, 0.8, 0.5, 0.5, 0.3, 0.7]
"""Ten scores with the mean .5."""
LOW_RANK = {"embedding": {"method": "low_rank"}}


def scored(name: str, items: list[float], seed: int = 0, **fields: object) -> Record:
    """A record with one score, the mean of its items."""
    recipes = {"dense": {}, "identity": IDENTITY}
    value = fields.pop("value", math.fsum(items) / len(items) if items else None)
    quantity = Quantity(value=value, unit="", how="by hand", samples=tuple(items))
    score = Score(task="t", metric="m", quantity=quantity, better="higher", data=DATA)
    trial = spec(name, recipes.get(name, {"embedding": {"method": "low_rank", "name": name}}), seed=seed)
    return record(trial, scores=(score,), **fields)


def shifted(name: str, by: float, **fields: object) -> Record:
    return scored(name, [item + by for item in ITEMS], **fields)


def gaps(*records: Record) -> dict[str, Gap]:
    return {row.recipe_name: row.scores["t m"].gap for row in summary(records) if "t m" in row.scores}


# ---- words of scores ----


def gap(value: float, low: float | None, high: float | None, p: float | None = 0.001) -> Gap:
    return Gap("difference", value, "", low, high, p)


@pytest.mark.parametrize(
    ("made", "better", "word", "good"),
    [
        (gap(0.3, 0.1, 0.5), "higher", "better", True),
        (gap(0.3, 0.1, 0.5), "lower", "worse", False),
        (gap(-0.3, -0.5, -0.1), "higher", "worse", False),
        (gap(-0.3, -0.5, -0.1), "lower", "better", True),
        (gap(0.3, 0.0, 0.5), "higher", NOISE, None),
        (gap(-0.3, -0.5, 0.0), "higher", NOISE, None),
        (gap(0.3, -0.1, 0.5), "higher", NOISE, None),
        # A gain needs p of at most .05, a loss does not.
        (gap(0.3, 0.1, 0.5, 0.049), "higher", "better", True),
        (gap(0.3, 0.1, 0.5, 0.051), "higher", NOISE, None),
        (gap(0.3, 0.1, 0.5, None), "higher", "better", True),
        (gap(-0.3, -0.5, -0.1, 0.9), "higher", "worse", False),
        (gap(0.0, 0.0, 0.0, 1.0), "higher", "same", None),
        (gap(0.0, None, None, None), "higher", "same", None),
        (gap(0.0, -0.1, 0.0), "higher", NOISE, None),
        (gap(0.0, 0.0, 0.1), "higher", NOISE, None),
        (gap(0.3, None, None, None), "higher", UNKNOWN, None),
        (gap(0.3, 0.1, None), "higher", UNKNOWN, None),
        (gap(0.3, None, 0.5), "higher", UNKNOWN, None),
    ],
)
def test_the_word_of_a_score_without_a_bar(made: Gap, better: str, word: str, good: bool | None) -> None:
    told = _score_word(made, None, better)
    assert (told.word, told.good) == (word, good)
    assert (told.value, told.low, told.high, told.p) == (made.value, made.low, made.high, made.p)


@pytest.mark.parametrize(
    ("bar", "reach"),
    [
        (gap(0.2, 0.1, 0.15), 0.2),
        (gap(-0.2, -0.1, 0.15), 0.2),
        (gap(0.0, -0.2, 0.1), 0.2),
        (gap(0.0, -0.1, 0.2), 0.2),
        (gap(0.2, None, None), 0.2),
        (gap(0.0, 0.0, 0.0), 0.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_identity_shows_too_is_noise(bar: Gap, reach: float, sign: int) -> None:
    """The bar is the farthest of the value and the ends of identity's interval, on both sides of zero."""
    beyond, within = reach + 0.01, reach * 0.99
    low, high = (0.9, 1.1) if sign > 0 else (-1.1, -0.9)
    assert _score_word(gap(sign * beyond, low, high), bar, "higher").word == ("better" if sign > 0 else "worse")
    if reach:
        assert _score_word(gap(sign * within, low, high), bar, "higher").word == NOISE
        assert _score_word(gap(sign * reach, low, high), bar, "higher").word == NOISE
        assert _score_word(gap(sign * within, None, None), bar, "higher").word == NOISE


def test_the_bar_of_identity_holds_for_every_score() -> None:
    """Each side moves all items equally, so every interval is the shift itself: .1 for identity."""
    told = gaps(
        shifted("dense", 0.0),
        shifted("identity", -0.1),
        shifted("loss within", -0.05),
        shifted("gain within", 0.09),
        shifted("loss beyond", -0.15),
        shifted("gain beyond", 0.12),
    )
    assert {name: one.word for name, one in told.items() if one} == {
        "identity": NOISE,
        "loss within": NOISE,
        "gain within": NOISE,
        "loss beyond": "worse",
        "gain beyond": "better",
    }
    # Without identity the same losses are reported.
    told = gaps(shifted("dense", 0.0), shifted("loss within", -0.05), shifted("gain within", 0.09))
    assert (told["loss within"].word, told["gain within"].word) == ("worse", "better")


def test_identity_is_not_one_of_the_several_tests() -> None:
    """Ten items that all rise: 2 of 2^10 sign patterns are as extreme. Holm multiplies by the variants alone."""
    told = gaps(shifted("dense", 0.0), shifted("identity", 0.01), shifted("a", 0.1), shifted("b", 0.2))
    assert told["identity"].p == pytest.approx(2 / 1024)
    assert (told["a"].p, told["b"].p) == pytest.approx((2 * 2 / 1024, 2 * 2 / 1024))
    assert gaps(shifted("dense", 0.0), shifted("a", 0.1))["a"].p == pytest.approx(2 / 1024)


def test_each_score_has_its_own_error_rate_and_bar() -> None:
    def two(name: str, first: float, second: float) -> Record:
        one = shifted(name, first)
        other = shifted(name, second).scores[0].model_copy(update={"metric": "n"})
        return one.model_copy(update={"scores": (*one.scores, other)})

    rows = {
        row.recipe_name: row for row in summary([two("dense", 0, 0), two("identity", 0.3, 0.0), two("a", 0.1, 0.1)])
    }
    assert score_keys(rows.values()) == ["t m", "t n"]
    assert [rows["a"].scores[key].gap.word for key in ("t m", "t n")] == [NOISE, "better"]
    assert [rows["a"].scores[key].gap.p for key in ("t m", "t n")] == pytest.approx([2 / 1024, 2 / 1024])


# ---- differences of scores ----


def test_a_gap_of_items_has_an_interval_a_p_and_says_how() -> None:
    told = gaps(shifted("dense", 0.0), shifted("x", -0.25))["x"]
    assert (told.kind, told.p) == ("difference", pytest.approx(2 / 1024))
    assert (told.value, told.low, told.high) == pytest.approx((-0.25, -0.25, -0.25))
    assert told.how == "10 items compared one by one: BCa bootstrap, 95%; p by flipping signs, Holm"
    assert told.to_dict() == {
        **{"kind": "difference", "value": told.value, "low": told.low, "high": told.high, "p": told.p},
        **{"how": told.how, "verdict": "worse"},
    }


@pytest.mark.parametrize(
    ("dense", "variant"),
    [
        (ITEMS, ITEMS[:5]),
        ([0.5], [0.4]),
        ([], []),
        (ITEMS, []),
    ],
)
def test_without_equal_items_only_the_values_are_compared(dense: list[float], variant: list[float]) -> None:
    told = gaps(scored("dense", dense, value=0.5), scored("x", variant, value=0.4))["x"]
    assert told.value == pytest.approx(-0.1)
    assert (told.low, told.high, told.p, told.word) == (None, None, None, UNKNOWN)
    assert "no items" in told.how


def test_two_items_are_enough() -> None:
    told = gaps(scored("dense", [0.5, 0.7]), scored("x", [0.4, 0.6]))["x"]
    assert (told.low, told.high, told.p) == pytest.approx((-0.1, -0.1, 2 / 4))


def test_a_mean_and_an_exponential_are_not_compared_item_by_item() -> None:
    told = gaps(scored("dense", ITEMS, value=math.exp(0.5)), scored("x", ITEMS))["x"]
    assert told.value == pytest.approx(0.5 - math.exp(0.5))
    assert told.low is None


@pytest.mark.parametrize(("value", "paired"), [(1 + 9e-7, True), (1 + 3e-6, False), (1 - 3e-6, False)])
def test_items_stand_for_a_value_that_is_their_mean_to_six_digits(value: float, paired: bool) -> None:
    told = gaps(scored("dense", ITEMS), scored("x", [2 * item for item in ITEMS], value=value))["x"]
    assert (told.low is not None) == paired


def test_items_that_give_neither_value_are_not_compared() -> None:
    told = gaps(scored("dense", ITEMS, value=7.0), scored("x", ITEMS, value=8.0))["x"]
    assert (told.value, told.low, told.word) == (1.0, None, UNKNOWN)


def test_a_mean_of_zero_is_a_mean() -> None:
    items = [-1.0, 1.0, -2.0, 2.0]
    told = gaps(scored("dense", items), scored("x", items, value=5e-10))["x"]
    assert told.low == told.high == 0.0


def test_a_mean_whose_exponential_is_no_number_is_not_a_perplexity() -> None:
    told = gaps(scored("dense", [800.0, 900.0], value=1.0), scored("x", [800.0, 900.0], value=2.0))["x"]
    assert (told.value, told.low) == (1.0, None)
    large = math.exp(690.0)
    told = gaps(scored("dense", [690.0, 690.0], value=large), scored("x", [690.0, 690.0], value=large))["x"]
    assert told.low is not None


def test_missing_values_are_not_compared() -> None:
    assert gaps(scored("dense", []), scored("x", ITEMS))["x"] is None
    assert gaps(scored("dense", ITEMS), scored("x", []))["x"] is None


def test_only_seeds_that_both_have_are_compared() -> None:
    told = gaps(shifted("dense", 0.0), shifted("dense", 0.5, seed=1), shifted("x", -0.25), shifted("x", 9.0, seed=2))
    assert told["x"].value == pytest.approx(-0.25)
    assert "seeds" not in told["x"].how
    assert gaps(shifted("dense", 0.0), shifted("x", -0.25, seed=1))["x"] is None


def test_seeds_widen_an_interval_and_never_narrow_it() -> None:
    """Shifts of .1 and .3: Student's interval reaches 12.7062 x .1 to both sides of .2."""
    told = gaps(*(shifted("dense", 0.0, seed=seed) for seed in (0, 1)), shifted("x", 0.1), shifted("x", 0.3, seed=1))[
        "x"
    ]
    assert told.value == pytest.approx(0.2)
    assert (told.low, told.high) == pytest.approx((0.2 - 1.27062, 0.2 + 1.27062), abs=1e-5)
    assert told.how.endswith("widened by Student's interval over 2 seeds")
    # Equal seeds have a Student interval of no width; the items' own interval stays.
    uneven = [item + (0.4 if index % 2 else 0.0) for index, item in enumerate(ITEMS)]
    once = gaps(scored("dense", ITEMS), scored("x", uneven))["x"]
    twice = gaps(*(scored(*one, seed=seed) for one in (("dense", ITEMS), ("x", uneven)) for seed in (0, 1)))["x"]
    assert once.low < 0.1 < 0.3 < once.high
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    # Without items there is only Student's interval.
    values = {("dense", 0): 0.5, ("dense", 1): 0.5, ("x", 0): 0.6, ("x", 1): 0.8}
    told = gaps(*(scored(name, [], seed=seed, value=value) for (name, seed), value in values.items()))["x"]
    assert (told.low, told.high) == pytest.approx((0.2 - 1.27062, 0.2 + 1.27062), abs=1e-5)
    assert told.p is None


def test_the_items_of_seeds_are_averaged() -> None:
    """The first item falls in one seed and rises in the other, so over both it does not differ."""
    first, second = [1.0, *ITEMS[1:]], [2 * ITEMS[0] - 1.0, *ITEMS[1:]]
    records = [scored("dense", ITEMS), scored("dense", ITEMS, seed=1), scored("x", first), scored("x", second, seed=1)]
    assert gaps(*records)["x"].p == 1.0


# ---- words of costs ----


@pytest.mark.parametrize(
    ("low", "high", "bar", "word", "good"),
    [
        (0.8, 0.99, None, 0, True),
        (0.8, 1.0, None, NOISE, None),
        (1.0, 1.2, None, NOISE, None),
        (1.01, 1.2, None, 1, False),
        (0.8, 0.94, (0.95, 1.02), 0, True),
        (0.8, 0.95, (0.95, 1.02), NOISE, None),
        (1.02, 1.2, (0.95, 1.02), NOISE, None),
        (1.03, 1.2, (0.95, 1.02), 1, False),
        # A bar that lies on one side of 1 does not move the other side away from 1.
        (0.8, 0.99, (1.02, 1.05), 0, True),
        (1.03, 1.2, (1.02, 1.05), NOISE, None),
        (1.01, 1.2, (0.95, 0.98), 1, False),
        (0.8, 0.99, (None, None), 0, True),
        (0.8, 0.96, (None, 0.95), NOISE, None),
        (None, 0.5, None, UNKNOWN, None),
        (2.0, None, None, UNKNOWN, None),
    ],
)
def test_the_word_of_a_latency(
    low: float | None, high: float | None, bar: tuple | None, word: int | str, good: bool | None
) -> None:
    control = Cell(1.0, "x", "", "lower", (), *bar) if bar else None
    told = _ratio_word(Gap("ratio", 1.0, "", low, high), control, ("faster", "slower"))
    assert (told.word, told.good) == (("faster", "slower")[word] if isinstance(word, int) else word, good)


def cost_row(name: str, **values: float | None) -> Row:
    cells = {key: Cell(value, "", "by hand", "lower", ()) for key, value in values.items()}
    return Row("m", name, {}, "variant", (), costs=cells)


@pytest.mark.parametrize(
    ("name", "ours", "dense", "ratio", "word", "good"),
    [
        ("stored_bytes", 50.0, 100.0, 0.5, "smaller", True),
        ("stored_bytes", 150.0, 100.0, 1.5, "larger", False),
        ("stored_bytes", 100.0, 100.0, 1.0, "same", None),
        ("file_bytes", 99.0, 100.0, 0.99, "smaller", True),
        ("resident_bytes", 101.0, 100.0, 1.01, "larger", False),
        ("logical_parameters", 50.0, 100.0, 0.5, "fewer", True),
        ("flops_per_token", 200.0, 100.0, 2.0, "more", False),
        ("cache_bytes_per_token", 25.0, 100.0, 0.25, "smaller", True),
        ("peak_bytes", 50.0, 100.0, 0.5, "", None),
        ("peak_bytes", 100.0, 100.0, 1.0, "", None),
    ],
)
def test_the_word_of_a_size(name: str, ours: float, dense: float, ratio: float, word: str, good: bool | None) -> None:
    told = _cost_gap(name, cost_row("x", **{name: ours}), cost_row("dense", **{name: dense}), None)
    assert (told.kind, told.value, told.word, told.good) == ("ratio", ratio, word, good)


@pytest.mark.parametrize("name", ["throughput", "compress_seconds", "energy_joules", "my_own_cost"])
def test_costs_that_are_not_compared(name: str) -> None:
    assert _cost_gap(name, cost_row("x", **{name: 1.0}), cost_row("dense", **{name: 2.0}), None) is None


def test_costs_without_a_counterpart_have_no_gap() -> None:
    dense = cost_row("dense", stored_bytes=100.0)
    assert _cost_gap("stored_bytes", dense, dense, None) is None
    assert _cost_gap("stored_bytes", cost_row("x", stored_bytes=None), dense, None) is None
    assert (
        _cost_gap("stored_bytes", cost_row("x", stored_bytes=1.0), cost_row("dense", stored_bytes=None), None) is None
    )
    assert _cost_gap("stored_bytes", cost_row("x", stored_bytes=1.0), cost_row("dense", stored_bytes=0.0), None) is None
    assert _cost_gap("stored_bytes", cost_row("x", stored_bytes=1.0), cost_row("dense"), None) is None
    assert _cost_gap("latency_decode", cost_row("x", latency_decode=1.0), dense, None) is None
    without = cost_row("x", latency_decode=1.0, latency_decode_ratio=None)
    assert _cost_gap("latency_decode", without, dense, None) is None


@pytest.mark.parametrize("name", ["latency_prefill", "latency_decode"])
def test_a_latency_is_its_interleaved_ratio_beside_that_of_identity(name: str) -> None:
    def row(low: float, high: float) -> Row:
        cell = Cell(0.93, "x", "interleaved", "lower", (), low, high)
        return Row("m", "x", {}, "variant", (), costs={name: Cell(5.0, "s", "", "lower", ()), f"{name}_ratio": cell})

    dense = cost_row("dense", **{name: 1.0})
    told = _cost_gap(name, row(0.9, 0.96), dense, None)
    assert told == Gap("ratio", 0.93, "interleaved", 0.9, 0.96, word="faster", good=True)
    assert _cost_gap(name, row(0.9, 0.96), dense, row(0.95, 1.0)).word == NOISE
    assert _cost_gap(name, row(0.9, 0.96), dense, cost_row("identity")).word == "faster"


def test_how_the_costs_read() -> None:
    """Words for less and more, the ratio's cost, the better side; a cost without words takes no side."""
    size, time, number = ("smaller", "larger"), ("faster", "slower"), ("fewer", "more")
    table = {
        "stored_bytes": (size, None, "lower", False),
        "file_bytes": (size, None, "lower", False),
        "resident_bytes": (size, None, "lower", False),
        "logical_parameters": (number, None, "lower", False),
        "peak_bytes": (None, None, "lower", False),
        "flops_per_token": (number, None, "lower", False),
        "cache_bytes_per_token": (size, None, "lower", False),
        "latency_prefill": (time, "latency_prefill_ratio", "lower", False),
        "latency_decode": (time, "latency_decode_ratio", "lower", False),
        "throughput": (None, None, "higher", True),
        "compress_seconds": (None, None, "lower", True),
        "energy_joules": (None, None, "lower", True),
    }
    assert {name: (one.words, one.ratio, one.better, one.alone) for name, one in COSTS.items()} == table
    assert Column("a", "b") == Column("a", "b", None, None, "lower", False)


# ---- rows ----


def test_the_rows_of_a_model_stand_together_in_the_order_of_their_start() -> None:
    trials = [("b", "late"), ("a", "dense"), ("b", "dense"), ("a", "late")]
    records = [
        record(spec(name, {} if name == "dense" else LOW_RANK, model=model), started=f"2026-01-0{day}")
        for day, (model, name) in enumerate(trials, 1)
    ]
    rows = summary(reversed(records))
    assert [row.name for row in rows] == ["b · late", "b · dense", "a · dense", "a · late"]


def test_the_latest_record_of_a_seed_counts_and_the_older_ones_are_counted() -> None:
    def at(day: int, seed: int, size: float, heal: int = 0, study: str = "s") -> Record:
        trial = spec("x", LOW_RANK, seed=seed, heal=heal, tasks=({"name": f"{day}"},), study=study)
        return record(trial, size=size, started=f"2026-01-0{day}")

    rows = summary([at(3, 0, 30.0), at(1, 0, 10.0), at(2, 0, 20.0), at(1, 1, 50.0), at(4, 0, 70.0, heal=9)])
    assert [(row.heal, row.superseded, row.costs["stored_bytes"].value) for row in rows] == [(0, 2, 40.0), (9, 0, 70.0)]
    assert [source.record.seed for source in rows[0].costs["stored_bytes"].sources] == [0, 1]


def test_a_row_of_failures_says_each_reason_once() -> None:
    reasons = ("no cache", None, "no cache", "too large")
    (row,) = summary(
        spec("x", {"memory": {"method": "window_sink"}}, seed=seed).record("failed", reason=why, started=f"{seed}")
        for seed, why in enumerate(reasons)
    )
    assert (row.status, row.reason) == ("failed", "no cache; no reason was given; too large")
    assert (row.records, len(row.failures), row.scores, row.bytes_per_slot) == ((), 4, {}, {})
    assert row.to_dict()["reason"] == "no cache; no reason was given; too large"


def test_one_failed_seed_leaves_the_others() -> None:
    trials = [spec("x", LOW_RANK, seed=seed) for seed in (0, 1)]
    done, failed = record(trials[0], size=5.0), trials[1].record("failed", reason="why")
    (row,) = summary([done, failed])
    assert (row.status, row.records, row.failures) == ("done", (done,), (failed,))
    assert row.bytes_per_slot == done.bytes_per_slot
    content = row.to_dict()
    assert content["records"] == [done.id, failed.id]
    assert (content["status"], content["reason"], content["heal"]) == ("done", "why", 0)
    assert content["costs"].keys() == {"stored_bytes", "latency_prefill", "peak_bytes"}, "no ratios"
    assert content["costs"]["stored_bytes"]["value"] == 5.0
    assert content["scores"]["docs_retrieval mrr@10"]["against_dense"] is None


def test_a_failed_dense_or_identity_is_no_baseline() -> None:
    dense = spec("dense").record("failed", reason="why")
    assert gaps(dense, shifted("x", -0.25))["x"] is None
    control = spec("identity", IDENTITY).record("failed", reason="why")
    assert gaps(shifted("dense", 0.0), control, shifted("x", -0.25))["x"].word == "worse"


def test_the_mean_over_seeds_has_students_interval() -> None:
    """1, 2 and 6: the mean is 3, the standard error sqrt(7 / 3), and t with two degrees of freedom 4.302653."""
    rows = summary([record(spec(seed=seed), size=size) for seed, size in enumerate((1.0, 2.0, 6.0))])
    cell, reach = rows[0].costs["stored_bytes"], 4.302652729911275 * math.sqrt(7 / 3)
    assert (cell.value, cell.low, cell.high) == pytest.approx((3.0, 3.0 - reach, 3.0 + reach))
    assert cell.how == "mean over 3 seeds, Student interval; counted, ties once"
    assert cell.to_dict() == {
        **{"value": cell.value, "unit": "B", "low": cell.low, "high": cell.high, "how": cell.how},
        "against_dense": None,
    }


def test_one_value_keeps_its_own_interval() -> None:
    quantity = Quantity(value=2.0, unit="s", how="a", low=1.0, high=3.0)
    missing = Quantity(value=None, unit="s", how="b")
    (row,) = summary([record(spec(seed=seed), costs={"x": one}) for seed, one in enumerate((missing, quantity))])
    assert (row.costs["x"].value, row.costs["x"].low, row.costs["x"].high) == (2.0, 1.0, 3.0)
    assert row.costs["x"].how == "b; a"
    (row,) = summary([record(costs={"x": missing})])
    assert (row.costs["x"].value, row.costs["x"].how, row.costs["x"].better) == (None, "b", "lower")
    (row,) = summary([record(costs={"throughput": quantity})])
    assert row.costs["throughput"].better == "higher"


def test_the_order_of_the_columns_of_costs() -> None:
    rows = [cost_row("a", zebra=1.0, latency_decode=1.0, peak_bytes=None), cost_row("b", apple=0.0, stored_bytes=2.0)]
    assert cost_keys(rows) == ["stored_bytes", "latency_decode", "apple", "zebra"]


@pytest.mark.parametrize(
    ("recipe", "role"),
    [
        ({}, "dense"),
        ({"embedding": []}, "dense"),
        (IDENTITY, "identity"),
        ({"embedding": [{"method": "identity"}, {"method": "identity"}]}, "identity"),
        ({"embedding": [{"method": "identity"}, {"method": "low_bit"}]}, "variant"),
        ({"embedding": {"method": "identity"}, "memory": {"method": "low_bit"}}, "variant"),
        ({"embedding": {"method": "low_bit"}}, "variant"),
    ],
)
def test_the_role_of_a_recipe(recipe: dict, role: str) -> None:
    assert role_of(recipe) == role


# ---- selection ----


@pytest.mark.parametrize(
    ("better", "behind"), [("higher", [0.0, 0.4, 0.0, 0.0, 0.1]), ("lower", [0.0, 0.0, 0.4, 0.4, 0.3])]
)
def test_how_far_rows_are_behind_those_that_are_not_larger(better: str, behind: list[float]) -> None:
    """Sizes 1, 2, 2, 3, 4 and scores .5, .2, .6, .6, .5."""
    table = [(1, 0.5), (2, 0.2), (2, 0.6), (3, 0.6), (4, 0.5)]
    rows = [
        Row("m", "r", {}, "variant", (), scores={"k": Cell(value, "", "", better, ())}, bytes_per_slot={"s": size})
        for size, value in table
    ]
    assert behind_front(rows, "k", "s") == pytest.approx(behind)
    assert behind_front([], "k", "s") == []

"""Statistics against closed forms, enumeration and simulation; then the words that follow from them."""

import itertools
import math

import numpy as np
import pytest
from sample_records import DATA, quickstart, record, spec
from scipy import stats

from taut.core.errors import TautError
from taut.core.record import Quantity, Record, Score
from taut.studies import statistics as st
from taut.studies.protocol import NOISE, UNKNOWN, Row, summary

A, B = (np.random.default_rng(0).gamma(2.0, size=(2, 40)) + 0.1).tolist()


def test_bootstrap_mirrors_when_the_sides_are_exchanged() -> None:
    for corrected in (False, True):
        there = st.paired_bootstrap(A, B, corrected=corrected)
        back = st.paired_bootstrap(B, A, corrected=corrected)
        assert there.value == pytest.approx(-back.value)
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_bootstrap_of_equal_sides_is_a_point_at_zero() -> None:
    assert st.paired_bootstrap(A, A) == st.Interval(0.0, 0.0, 0.0)


def test_bootstrap_does_not_see_a_shift_of_both_sides() -> None:
    shifted = st.paired_bootstrap([a + 3 for a in A], [b + 3 for b in B])
    plain = st.paired_bootstrap(A, B)
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_percentile_interval_equals_enumeration() -> None:
    """Of 3 items all 27 resamples can be listed; the ends of the interval are quantiles of that list."""
    variant, baseline = [1.0, 5.0, 9.0], [0.0, 1.0, 2.0]
    gaps = np.subtract(variant, baseline)
    means = sorted(np.mean(gaps[list(drawn)]) for drawn in itertools.product(range(3), repeat=3))
    interval = st.paired_bootstrap(variant, baseline, corrected=False, confidence=0.9)
    # 1/27 < 5 % < 1/27 + 3/27: the 5 % quantile is the second of the distinct means.
    distinct = sorted(set(np.round(means, 12)))
    assert interval.low == pytest.approx(distinct[1])
    assert interval.high == pytest.approx(distinct[-2])


@pytest.mark.parametrize("contrast", [st.difference, st.ratio])
def test_bca_agrees_with_scipy(contrast: st.Contrast) -> None:
    mine = st.paired_bootstrap(A, B, contrast, resamples=40_000)
    theirs = stats.bootstrap(
        (A, B),
        lambda a, b, axis: contrast(np.mean(a, axis), np.mean(b, axis)),
        paired=True,
        vectorized=True,
        method="BCa",
        n_resamples=40_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(mine.low - theirs.low) < 0.03 * width
    assert abs(mine.high - theirs.high) < 0.03 * width


def test_bca_is_the_published_interval() -> None:
    """Test A of the 26 children of Efron & Tibshirani (1993), table 14.1; the variance as a contrast of two means.

    Table 14.2 gives the 90 % intervals from 2000 resamples: (100.8, 233.9) by percentiles, (115.8, 259.6) by BCa. The
    tolerance is what 2000 resamples leave open. Without acceleration BCa would be (111.2, 252.4).
    """
    scores = [48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41]
    squares = [score**2 for score in scores]

    def variance(squares: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return squares - mean**2

    bca, percentile = (
        st.paired_bootstrap(squares, scores, variance, confidence=0.9, resamples=20_000, corrected=flag)
        for flag in (True, False)
    )
    assert bca.value == pytest.approx(171.5, abs=0.05)
    assert (bca.low, bca.high) == pytest.approx((115.8, 259.6), abs=4.0)
    assert (percentile.low, percentile.high) == pytest.approx((100.8, 233.9), abs=4.0)


def test_bca_without_a_correction_is_the_percentile_interval() -> None:
    """Where all resamples are alike, and where the value is at the rim of them, BCa is undefined."""
    threes, half = [3.0] * 8, [0.5] * 8
    assert st.paired_bootstrap(threes, half) == st.Interval(2.5, 2.5, 2.5)
    assert st.paired_bootstrap(threes, half, st.ratio) == st.Interval(6.0, 6.0, 6.0)

    def highest(ours: np.ndarray, dense: np.ndarray) -> np.ndarray:
        return np.minimum(ours - dense, 0.2)

    rim = st.paired_bootstrap([0.1, 0.3, 0.3, 0.3], [0.0] * 4, highest)
    assert rim.low < rim.high == rim.value == 0.2


def test_bca_moves_towards_the_long_tail() -> None:
    skewed = [*([0.0] * 30), 10.0, 20.0]
    bca, percentile = (st.paired_bootstrap(skewed, [0.0] * 32, corrected=flag) for flag in (True, False))
    assert bca.high > percentile.high
    assert bca.low >= percentile.low


def test_bootstrap_covers_what_it_should() -> None:
    generator, hits = np.random.default_rng(3), 0
    for _ in range(200):
        base = generator.normal(size=60)
        interval = st.paired_bootstrap(base + generator.normal(0.3, 1.0, 60), base, resamples=800)
        hits += interval.low <= 0.3 <= interval.high
    # 95 % of 200 is 190; five standard deviations of the count are 15.
    assert 175 <= hits <= 200


def test_exponential_contrast_is_a_difference_of_perplexities() -> None:
    contrast = st.paired_bootstrap(A, B, st.difference_of_exponentials)
    assert contrast.value == pytest.approx(math.exp(np.mean(A)) - math.exp(np.mean(B)))
    assert contrast.low < contrast.value < contrast.high


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = st.paired_bootstrap(A, B, resamples=500)
    monkeypatch.setattr(st, "CELLS_AT_ONCE", 40 * 64)
    assert st.paired_bootstrap(A, B, resamples=500) == whole


def test_sign_flips_are_exact_for_few_items() -> None:
    zeros = [0.0] * 9
    assert st.sign_flip_test([1, 2, 3, 4, 5, 0, 0, 0, 0], zeros) == 2 / 32
    assert st.sign_flip_test([1, -1, *zeros[2:]], zeros) == 1.0
    assert st.sign_flip_test(zeros, zeros) == 1.0
    # Of 8 patterns of (3, 1, 1), |sum| >= |3 + 1 - 1| for +++ ++- +-+ and their mirrors.
    assert st.sign_flip_test([3, 1, -1], [0, 0, 0]) == 6 / 8


def test_up_to_twelve_differences_are_flipped_in_every_way() -> None:
    """Of 2^12 patterns of twelve ones, only the two without a change reach 12. Thirteen are sampled: a sample of
    10,000 of 8192 patterns, of which two reach 13, and the one as it is."""
    assert st.sign_flip_test([1.0] * 12, [0.0] * 12) == 2 / 4096
    sampled = st.sign_flip_test([1.0] * 13, [0.0] * 13)
    assert sampled * 10_001 == pytest.approx(round(sampled * 10_001))
    assert 1 <= round(sampled * 10_001) <= 12
    assert st.sign_flip_test([1.0] * 13, [0.0] * 13, resamples=1) in (0.5, 1.0)


def test_rounding_does_not_break_ties_between_sums() -> None:
    """.1 + .2 + .3 is .6000000000000001 or .6 by the order of its terms; |sum| >= .6 for +++ and --- alone."""
    assert st.sign_flip_test([0.1, 0.2, 0.3], [0.0] * 3) == 2 / 8
    assert st.sign_flip_test([0.3, 0.2, 0.1, -0.1], [0.0] * 4) == st.sign_flip_test([3, 2, 1, -1], [0] * 4) == 6 / 16


def test_chunks_cover_all_sign_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences that cancel exactly: every sum is at least as far from zero, so every resample counts."""
    ours, dense = [1.0, -1.0] * 10, [0.0] * 20
    for cells in (1, 20 * 7, 20 * 50):
        monkeypatch.setattr(st, "CELLS_AT_ONCE", cells)
        assert st.sign_flip_test(ours, dense, resamples=50) == 1.0


def test_sampled_sign_flips_agree_with_scipy() -> None:
    theirs = stats.permutation_test(
        (np.subtract(A, B),), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    ).pvalue
    assert st.sign_flip_test(A, B) == pytest.approx(theirs, abs=0.02)
    assert st.sign_flip_test([a + 100 for a in A], B) == pytest.approx(1 / 10_001)


def test_holm_is_the_textbook_example() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]
    # 3 x .02 = .06; then max(.06, 2 x .025 = .05); then max(.06, .5).
    assert st.holm([0.5, 0.02, 0.025]) == pytest.approx([0.5, 0.06, 0.06])
    assert st.holm([]) == []


def test_student_interval_is_the_textbook_one() -> None:
    interval = st.student_interval([1.0, 2.0, 3.0])
    reach = 4.302652729911275 / math.sqrt(3)
    assert (interval.value, interval.low, interval.high) == pytest.approx((2.0, 2.0 - reach, 2.0 + reach))
    # t with one degree of freedom at 90 %: tan(0.45 pi).
    interval = st.student_interval([1.0, 3.0], confidence=0.9)
    assert (interval.low, interval.high) == pytest.approx((2 - math.tan(0.45 * math.pi), 2 + math.tan(0.45 * math.pi)))
    assert st.student_interval([5.0, 5.0, 5.0]) == st.Interval(5.0, 5.0, 5.0)
    with pytest.raises(TautError, match="add seeds"):
        st.student_interval([1.0])


def test_pareto_front() -> None:
    points = [(1, 0.2), (2, 0.5), (2, 0.5), (3, 0.4), (4, 0.9), (5, 0.9)]
    assert st.pareto_front(points, (True, False)) == [0, 1, 2, 4]
    assert st.pareto_front([(1, 1), (2, 2)], (True, True)) == [0]
    assert st.pareto_front([], (True, True)) == []
    assert st.pareto_front([(1, 1), (1, 2), (2, 1), (0, 3)], (False, True)) == [2]
    assert st.pareto_front([(1, 1), (1, 2), (2, 1), (0, 3)], (True, True)) == [0, 3]


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_what_cannot_be_paired_is_refused(first: list[float], second: list[float]) -> None:
    for test in (st.paired_bootstrap, st.sign_flip_test):
        with pytest.raises(TautError, match="paired comparison needs"):
            test(first, second)


# ---- the protocol ----


def by_name(records: list[Record]) -> dict[str, Row]:
    return {row.recipe_name: row for row in summary(records)}


def test_the_study_of_the_sample_reads_as_it_was_made() -> None:
    rows = by_name(quickstart())
    key = "docs_retrieval mrr@10"
    assert rows["dense"].scores[key].gap is None
    assert rows["identity"].scores[key].gap.word == "same"
    assert rows["table low-rank 0.25"].scores[key].gap.word == "worse"
    assert rows["table int8"].scores[key].gap.word == NOISE
    assert rows["table int8"].costs["stored_bytes"].gap.word == "smaller"
    assert rows["linears int8"].costs["latency_prefill"].gap.word == "faster"
    assert rows["local attention"].costs["latency_prefill"].gap.word == "slower"
    assert rows["identity"].costs["latency_prefill"].gap.word == NOISE
    assert rows["cache on an encoder"].status == "failed"
    assert "no cache" in rows["cache on an encoder"].reason
    assert rows["table int8"].costs["peak_bytes"].value is None


def timed(name: str, value: float, low: float | None, high: float | None) -> Record:
    recipe = {"embedding": {"method": name, "knob": value} if name != "identity" else {"method": name}}
    ratio = Quantity(value=value, unit="x", how="", low=low, high=high)
    time = Quantity(value=value, unit="s", how="")
    return record(spec(f"{name}{value}", recipe), costs={"latency_prefill": time, "latency_prefill_ratio": ratio})


def test_faster_needs_to_leave_the_error_bar_of_identity() -> None:
    dense = record(spec("dense"))
    rows = by_name(
        [
            dense,
            timed("identity", 1.03, 0.95, 1.06),
            timed("low_rank", 0.97, 0.96, 0.98),
            timed("low_rank", 0.9, 0.85, 0.94),
            timed("low_rank", 1.05, 1.02, 1.08),
            timed("low_rank", 1.2, 1.07, 1.3),
            timed("low_rank", 0.5, None, None),
        ]
    )
    words = {name: row.costs["latency_prefill"].gap.word for name, row in rows.items() if row.role != "dense"}
    assert words == {
        "identity1.03": NOISE,
        "low_rank0.97": NOISE,
        "low_rank0.9": "faster",
        "low_rank1.05": NOISE,
        "low_rank1.2": "slower",
        "low_rank0.5": UNKNOWN,
    }


def scored(name: str, samples: list[float], better: str = "higher", **changes: object) -> Record:
    value = changes.pop("value", sum(samples) / len(samples) if samples else 0.0)
    quantity = Quantity(value=value, unit="", how="", samples=tuple(samples))
    score = Score(task="t", metric="m", quantity=quantity, better=better, data=changes.pop("data", DATA))
    recipe = {} if name == "dense" else {"embedding": {"method": "low_rank", "name": name}}
    return record(spec(name, recipe, **changes), scores=(score,))


def test_scores_are_compared_only_on_the_same_data() -> None:
    rows = by_name([scored("dense", A), scored("x", B, data=DATA | {"sha256": "other"})])
    assert rows["x"].scores["t m"].gap is None


def test_without_items_there_is_no_verdict() -> None:
    rows = by_name([scored("dense", [], value=0.5), scored("x", [], value=0.4)])
    assert rows["x"].scores["t m"].gap.word == UNKNOWN
    # Items that do not add up to the value cannot stand for it.
    rows = by_name([scored("dense", A, value=7.7), scored("x", B, value=7.6)])
    assert rows["x"].scores["t m"].gap.word == UNKNOWN


def test_lower_is_better_turns_the_words() -> None:
    worse = [a + 1 + 0.01 * i for i, a in enumerate(A)]
    for better, word in (("higher", "better"), ("lower", "worse")):
        rows = by_name([scored("dense", A, better), scored("x", worse, better)])
        assert rows["x"].scores["t m"].gap.word == word


def test_perplexities_are_compared_through_their_logarithms() -> None:
    more = [a + 0.1 + 0.001 * i for i, a in enumerate(A)]
    rows = by_name(
        [
            scored("dense", A, "lower", value=math.exp(np.mean(A))),
            scored("x", more, "lower", value=math.exp(np.mean(more))),
        ]
    )
    gap = rows["x"].scores["t m"].gap
    assert gap.value == pytest.approx(math.exp(np.mean(more)) - math.exp(np.mean(A)))
    assert gap.low < gap.value < gap.high
    assert gap.word == "worse"


def test_many_recipes_share_one_error_rate() -> None:
    """A p-value of about .01 alone is a call; among ten it is none."""
    generator = np.random.default_rng(5)
    base = generator.normal(size=100)
    shift = generator.normal(size=100)
    shift = shift - shift.mean() + 0.25 * shift.std()
    variant = scored("x", (base + shift).tolist())
    others = [scored(f"n{i}", (base + generator.permutation(shift - shift.mean())).tolist()) for i in range(9)]
    alone = by_name([scored("dense", base.tolist()), variant])["x"].scores["t m"].gap
    among = by_name([scored("dense", base.tolist()), variant, *others])["x"].scores["t m"].gap
    assert alone.p == pytest.approx(0.0125, abs=0.01)
    assert among.p == pytest.approx(min(1.0, 10 * alone.p))
    assert (alone.word, among.word) == ("better", NOISE)
    # A loss needs no correction: it is reported as soon as its interval shows it.
    lost = scored("x", (base - shift).tolist())
    gap = by_name([scored("dense", base.tolist()), lost, *others])["x"].scores["t m"].gap
    assert gap.p > 0.05
    assert gap.word == "worse"


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    records = [scored(name, A if name == "dense" else [a + shift for a in A], seed=seed)
               for seed, shift in enumerate((0.1, 0.2, 0.6)) for name in ("dense", "x")]  # fmt: skip
    row = by_name(records)["x"]
    cell, expected = row.scores["t m"], st.student_interval([0.1, 0.2, 0.6])
    assert len(row.records) == 3
    assert cell.value == pytest.approx(np.mean(A) + 0.3)
    assert cell.gap.value == pytest.approx(0.3)
    assert (cell.gap.low, cell.gap.high) == pytest.approx((expected.low, expected.high))
    assert cell.gap.word == NOISE


def test_the_latest_of_several_records_is_shown_and_the_rest_counted() -> None:
    old = record(spec("dense"), size=10.0, started="2026-01-01")
    new = record(spec("dense", measure={"latency": {"batch": 4}}), size=20.0, started="2026-01-02")
    (row,) = summary([new, old])
    assert row.costs["stored_bytes"].value == 20.0
    assert row.superseded == 1


def test_models_are_compared_with_their_own_dense() -> None:
    shift = record(spec("dense", model="other"), size=10.0)
    half = record(spec("half", {"embedding": {"method": "low_rank"}}, model="other"), size=5.0)
    rows = summary([*quickstart(), shift, half])
    assert next(row for row in rows if row.recipe_name == "half").costs["stored_bytes"].gap.value == 0.5

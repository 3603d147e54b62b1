"""Intervals and tests for the differences between two trials. numpy and scipy, fixed seeds, no state."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, sem, t

from taut.core.errors import TautError

CONFIDENCE = 0.95
CELLS_AT_ONCE = 4_000_000
"""The most numbers of a resampling that are in memory at a time."""

Contrast = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""What is compared, from the mean of the variant and the mean of the baseline."""


@dataclass(frozen=True)
class Interval:
    """A value between the ends of its interval, in the unit of the value."""

    value: float
    low: float
    high: float


def difference(variant: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Mean of the variant minus mean of the baseline."""
    return variant - baseline


def difference_of_exponentials(variant: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """For perplexities, whose items are negative log-likelihoods."""
    return np.exp(variant) - np.exp(baseline)


def ratio(variant: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Mean of the variant over mean of the baseline."""
    return variant / baseline


def paired_bootstrap(
    variant: Sequence[float],
    baseline: Sequence[float],
    contrast: Contrast = difference,
    confidence: float = CONFIDENCE,
    resamples: int = 10_000,
    seed: int = 0,
    corrected: bool = True,
) -> Interval:
    """The bootstrap interval of a contrast between two sets of scores of the same N items, in the same order.

    Both sides are resampled with the same items, so what makes an item hard for both cancels. ``corrected`` chooses the
    BCa interval (bias-corrected and accelerated), else the percentile interval, which also stands in where BCa is
    undefined. If no resample differs from the value, the interval is the value itself. Raises TautError unless N >= 2
    and both have N items.

    Source: B. Efron, Better Bootstrap Confidence Intervals, JASA 82 (1987).
    """
    pairs = _pairs(variant, baseline)
    # Where BCa is undefined, scipy warns and answers NaN.
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            tuple(pairs),
            lambda ours, dense, axis: contrast(ours.mean(axis), dense.mean(axis)),
            n_resamples=resamples,
            batch=_rows_at_once(pairs.shape[1]),
            vectorized=True,
            paired=True,
            confidence_level=confidence,
            method="BCa" if corrected else "percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    if not np.isfinite([low, high]).all():
        # All resamples lie on one side of the value, or no item changes it.
        low, high = np.quantile(result.bootstrap_distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(contrast(*pairs.mean(axis=1))), float(low), float(high))


def sign_flip_test(
    variant: Sequence[float], baseline: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> float:
    """Test the hypothesis that the two are exchangeable on every item, by flipping the signs of the differences.

    Returns the two-sided p-value. If at most 12 items differ, all 2^n sign patterns are tried, else a fixed random
    sample of them.
    """
    pairs = _pairs(variant, baseline)
    gaps = pairs[0] - pairs[1]
    gaps = gaps[gaps != 0]
    if gaps.size == 0:
        return 1.0
    reached = abs(gaps.sum()) * (1 - 1e-12)
    if gaps.size <= 12:
        signs = 1 - 2 * ((np.arange(2**gaps.size)[:, None] >> np.arange(gaps.size)) & 1)
        return float(np.mean(np.abs(signs @ gaps) >= reached))
    generator, extreme = np.random.default_rng(seed), 0
    for size in _chunks(resamples, gaps.size):
        signs = 1.0 - 2.0 * generator.integers(0, 2, (size, gaps.size), dtype=np.int8)
        extreme += int(np.sum(np.abs(signs @ gaps) >= reached))
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values because they are several (Holm 1979). Keeps their order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = worst
    return adjusted


def student_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of values over seeds, with Student's t interval. Raises TautError for fewer than two values."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        raise TautError(f"an interval over seeds needs at least 2 values, not {sample.size}; add seeds to the study")
    mean = float(sample.mean())
    reach = float(t.ppf((1 + confidence) / 2, sample.size - 1) * sem(sample))
    return Interval(mean, mean - reach, mean + reach)


def pareto_front(points: Sequence[Sequence[float]], lower_is_better: Sequence[bool]) -> list[int]:
    """Indices of the points that no other beats: as good in every column, better in one. Equal points all stay."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, len(lower_is_better))
    table = np.where(np.asarray(lower_is_better), table, -table)
    return [
        index
        for index, point in enumerate(table)
        if not np.any(np.all(table <= point, axis=1) & np.any(table < point, axis=1))
    ]


def _pairs(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    """Both sequences as (2, N) float64. Raises TautError unless both have the same length N >= 2."""
    if len(first) != len(second):
        raise TautError(f"a paired comparison needs the same items on both sides, not {len(first)} and {len(second)}")
    if len(first) < 2:
        raise TautError(f"a paired comparison needs at least 2 items, not {len(first)}")
    return np.asarray([first, second], dtype=np.float64)


def _chunks(total: int, width: int) -> Iterator[int]:
    size = _rows_at_once(width)
    for start in range(0, total, size):
        yield min(size, total - start)


def _rows_at_once(width: int) -> int:
    return max(1, CELLS_AT_ONCE // width)

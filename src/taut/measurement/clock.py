"""ABAB timing: all cases take turns in one run, so that a slow phase of the machine affects all of them."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from taut.core.errors import TautError, nearest
from taut.core.record import Quantity

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHORTEST_SAMPLE = 2e-3
"""Seconds. In a shorter sample, the clock and the interpreter would add too much to the time of the case."""


@dataclass(frozen=True)
class Timing:
    """The time of one call: ``samples`` in seconds per call, one for each round of ``compare``."""

    samples: tuple[float, ...]
    threads: int
    clock: str
    device: str = "cpu"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantity(self) -> Quantity:
        """The median in seconds per call, with the 95 % interval of the median."""
        low, high = median_interval(self.samples)
        return Quantity(
            value=self.median, unit="s", how=f"median of {self.describe()}", samples=self.samples, low=low, high=high
        )

    def per(self, count: int) -> "Timing":
        """The time of one step, if a call consists of ``count`` equal steps."""
        return replace(self, samples=tuple(sample / count for sample in self.samples))

    def describe(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{len(self.samples)} interleaved samples, {self.clock} clock, {threads}, {self.device}"


@dataclass(frozen=True)
class Prepared:
    """A case whose every call needs a new input: ``run(prepare())``. Only ``run`` is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


Case = Callable[[], Any] | Prepared


def compare(
    cases: Mapping[str, Case],
    *,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    clock: str = "wall",
    minimum_seconds: float = 0.0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time all cases in turn, in ``repeats`` rounds; each round has a new random order (fixed seed).

    A sample repeats its case until it lasts ``minimum_seconds``, and at least 2 ms. ``clock`` is ``wall`` or ``cpu``
    (seconds of this process, summed over threads). ``threads`` sets torch's intra-op threads during the run; the old
    number is restored after it. On ``device`` cuda each sample ends with a synchronisation. Garbage collection is off
    while a sample runs. Raises TautError for no cases, no repeats, or a clock that cannot measure the device.
    """
    device = torch.device(device)
    if not cases:
        raise TautError("cases is empty; give at least one name and function to time")
    if repeats < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise TautError(f"repeats = {repeats}, warmup = {warmup}, threads = {threads}: expected at least 1, 0 and 1")
    if clock not in CLOCKS:
        raise TautError(f"unknown clock {clock!r}: {nearest(clock, CLOCKS)}")
    if clock == "cpu" and device.type != "cpu":
        raise TautError(f"the cpu clock cannot measure the work of {device}; use clock='wall'")

    names = list(cases)
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    with _threads(threads) as used, _no_collection():
        loops = {}
        for name in names:
            for _ in range(warmup):
                _sample(cases[name], CLOCKS[clock], 1, device)
            loops[name] = _loops(cases[name], CLOCKS[clock], max(SHORTEST_SAMPLE, minimum_seconds), device)
        for _ in range(repeats):
            order.shuffle(names)
            for name in names:
                samples[name].append(_sample(cases[name], CLOCKS[clock], loops[name], device))
            gc.collect(0)
    return {name: Timing(tuple(samples[name]), used, clock, str(device)) for name in cases}


def ratio(a: Timing, b: Timing) -> Quantity:
    """The ratio a / b: the median of the ratios of samples from the same round, with its 95 % interval.

    Above 1, ``a`` is slower. Both must come from one call of ``compare``. Raises TautError if they cannot.
    """
    if (len(a.samples), a.clock, a.threads, a.device) != (len(b.samples), b.clock, b.threads, b.device):
        raise TautError(
            f"a ratio needs two timings of one run, not {a.describe()!r} and {b.describe()!r}; time them together"
        )
    ratios = tuple(x / y for x, y in zip(a.samples, b.samples, strict=True))
    low, high = median_interval(ratios)
    how = f"median of paired ratios of {a.describe()}; interval by the sign test"
    return Quantity(value=statistics.median(ratios), unit="x", how=how, samples=ratios, low=low, high=high)


def median_interval(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of the median by order statistics (the inverted sign test).

    It assumes nothing about the distribution and covers at least 95 %. (None, None) for fewer than 6 samples, because
    then no such interval exists.

    Source: W. J. Conover, Practical Nonparametric Statistics, section 3.2.
    """
    count, rank, below = len(samples), 0, 0.0
    while (below := below + math.comb(count, rank) * 0.5**count) <= 0.025:
        rank += 1
    if rank == 0:
        return None, None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[count - rank]


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(case: Case, now: Callable[[], float], loops: int, device: torch.device) -> float:
    """Seconds per call. A plain function is timed over all loops at once, a ``Prepared`` case call by call."""
    if isinstance(case, Prepared):
        return sum(_span(case.run, (case.prepare(),), now, 1, device) for _ in range(loops)) / loops
    return _span(case, (), now, loops, device) / loops


def _span(
    function: Callable[..., Any], given: tuple[Any, ...], now: Callable[[], float], loops: int, device: torch.device
) -> float:
    synchronize(device)
    start = now()
    for _ in range(loops):
        function(*given)
    synchronize(device)
    return now() - start


def _loops(case: Case, now: Callable[[], float], shortest: float, device: torch.device) -> int:
    """The number of calls that make a sample last ``shortest`` seconds."""
    loops = 1
    while (spent := _sample(case, now, loops, device) * loops) < shortest:
        # The processor clock may not have ticked yet, so raise the number at most tenfold per step.
        loops = max(loops + 1, math.ceil(loops * min(10.0, 1.2 * shortest / max(spent, 1e-9))))
    return loops


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

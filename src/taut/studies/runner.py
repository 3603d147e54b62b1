"""Runs a study: skips what the ledger holds, leases one trial at a time, and continues after a failed trial."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Protocol

import psutil

from taut.core.environment import environment
from taut.core.errors import TautError
from taut.core.record import Record
from taut.core.spec import TrialSpec
from taut.core.table import LINES, clip
from taut.studies.comparison import Comparison
from taut.studies.display import Display, open_display
from taut.studies.ledger import Ledger
from taut.studies.protocol import role_of, summary
from taut.studies.study import Study

INTERRUPTED = 130
LONGEST_REASON = 400

log = logging.getLogger("taut")


class ReadyTrial(Protocol):
    """A trial that is ready to run. ``taut.studies.trial.Trial`` is one."""

    reason: str | None
    """Why it cannot work (the recipe fits no site), or None."""

    def estimate(self) -> dict[str, float]:
        """Roughly the ``seconds`` and the ``bytes`` of memory that the trial will take."""

    def run(self, report: Callable[[str], None]) -> Record:
        """Run the whole trial. ``report`` is called with a few words on what is being done."""


Prepare = Callable[[TrialSpec], ReadyTrial]
"""Makes a trial from a spec. Raises TautError for input that is wrong with any recipe."""


@dataclass
class Outcome:
    """How a run ended. ``records`` are those of the study's trials, from any run; ``ran`` are those of this run."""

    study: str
    ledger: Path
    total: int
    records: list[Record] = field(default_factory=list)
    ran: list[Record] = field(default_factory=list)
    skipped: list[TrialSpec] = field(default_factory=list)
    elsewhere: list[tuple[TrialSpec, str]] = field(default_factory=list)
    refused: list[tuple[TrialSpec, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def unexpected(self) -> list[Record]:
        """The failures that the study did not expect."""
        return [record for record in self.records if record.status == "failed" and record.expect != "failed"]

    @property
    def exit_code(self) -> int:
        """130 after ctrl-C, 1 when a trial failed unexpectedly or was refused, else 0."""
        if self.interrupted:
            return INTERRUPTED
        return 1 if self.unexpected or self.refused else 0

    @cached_property
    def rows(self) -> Comparison:
        """The comparison, a row for each model and recipe. Made once, because its intervals take seconds."""
        return Comparison(summary(self.records))

    def __repr__(self) -> str:
        return f"{clip(self.sentence())}\n{self.rows.text(LINES - 1)}"

    def _repr_html_(self) -> str:
        return f"{self.rows._repr_html_()}<div>{escape(self.sentence())}</div>"

    def to_pandas(self) -> Any:
        """The comparison as tidy rows; see ``Comparison.tidy``. Raises TautError if pandas is not installed."""
        return self.rows.to_pandas()

    def sentence(self) -> str:
        """One line for the end of the run."""
        failed = sum(record.status == "failed" for record in self.records)
        counts = {
            "done": len(self.records) - failed,
            "failed as expected": failed - len(self.unexpected),
            "failed": len(self.unexpected),
            "refused for memory": len(self.refused),
            "left to another runner": len(self.elsewhere),
        }
        counts["not finished"] = self.total - sum(counts.values())
        text = ", ".join(f"{count} {words}" for words, count in counts.items() if count > 0)
        earlier = f" ({len(self.skipped)} were in the ledger already)" if self.skipped else ""
        return f"{self.total} trials: {text}{earlier}"

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "study": self.study,
            "ledger": str(self.ledger),
            "trials": self.total,
            "ran": [record.id for record in self.ran],
            "skipped": [spec.id for spec in self.skipped],
            "unexpected_failures": [{"trial": record.trial, "reason": record.reason} for record in self.unexpected],
            "elsewhere": [{"trial": spec.name, "holder": holder} for spec, holder in self.elsewhere],
            "refused": [{"trial": spec.name, "reason": reason} for spec, reason in self.refused],
            "interrupted": self.interrupted,
            **self.rows.to_dict(),
        }


def compare(study: Study, ledger: Ledger, view: Display | None = None) -> Outcome:
    """Run a study with ``taut.studies.trial``; see ``run``."""
    # Imported late, because it imports torch and transformers.
    from taut.studies.trial import Trial

    return run(study, ledger, Trial, view)


def run(study: Study, ledger: Ledger, prepare: Prepare, view: Display | None = None) -> Outcome:
    """Run the trials that the ledger does not hold yet, and return how the run ended.

    All trials are checked before the first one runs. After ctrl-C or kill -9 the ledger holds all finished trials, and
    the next run takes over the lease of a killed run. Raises TautError for wrong input, if no recipe of the study can
    work, and if no trial has the memory it needs.
    """
    specs = study.trials()
    view = view or open_display()
    outcome = Outcome(study.name, ledger.path, len(specs))
    try:
        outcome.skipped = [spec for spec in specs if ledger.has(spec.id)]
        finished = {spec.id for spec in outcome.skipped}
        pending = [spec for spec in specs if spec.id not in finished]
        trials = {spec.id: prepare(spec) for spec in pending}
        variants = [spec for spec in specs if role_of(spec.recipe) == "variant" and spec.expect == "done"]
        if variants and all(spec.id in trials and trials[spec.id].reason for spec in variants):
            first = variants[0]
            raise TautError(f"{study.source}: no recipe can work; the first: {first.name}: {trials[first.id].reason}")
        for path, reason in ledger.damaged():
            view.say(f"damaged record skipped: {path}: {reason}")
        affordable = _afford(pending, trials, outcome, view)
        for number, spec in enumerate(affordable, 1):
            # Removed from the dict, so that what a trial opened is freed after it has run.
            _one(spec, trials.pop(spec.id), ledger, view, outcome, (number, len(affordable)))
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        view.close()
    ids = {spec.id for spec in specs}
    outcome.records = [record for record in ledger.records() if record.id in ids]
    view.say(outcome.sentence())
    if outcome.interrupted:
        view.say(f"interrupted; finished trials are in {ledger.path}; repeat the command to continue")
    return outcome


def _afford(
    pending: Sequence[TrialSpec], trials: dict[str, ReadyTrial], outcome: Outcome, view: Display
) -> list[TrialSpec]:
    """Report what the run will take, and leave out the trials that need more memory than is available."""
    free, affordable, seconds, peak = free_memory(), [], 0.0, 0.0
    for spec in pending:
        trial = trials[spec.id]
        guess = {"seconds": 0.0, "bytes": 0.0} if trial.reason else trial.estimate()
        limit = free if spec.ram is None else spec.ram
        if guess["bytes"] > limit:
            why = f"needs about {_gigabytes(guess['bytes'])}, and {_gigabytes(limit)} is "
            outcome.refused.append((spec, why + ("free" if spec.ram is None else "the limit of the study")))
            view.say(f"refused: {spec.name}: {outcome.refused[-1][1]}")
            continue
        affordable.append(spec)
        seconds, peak = seconds + guess["seconds"], max(peak, guess["bytes"])
    if pending and not affordable:
        spec, why = outcome.refused[0]
        raise TautError(f"no trial has the memory it needs; the first: {spec.name} {why}")
    if affordable:
        more = f"{len(outcome.skipped)} more in the ledger, " if outcome.skipped else ""
        view.say(f"{len(affordable)} trials to run, {more}about {_duration(seconds)} and {_gigabytes(peak)} of memory")
    return affordable


def _one(
    spec: TrialSpec, trial: ReadyTrial, ledger: Ledger, view: Display, outcome: Outcome, place: tuple[int, int]
) -> None:
    """Run one trial under its lease and write its record, also if it fails.

    ``place`` is its number and the number of trials.
    """
    with ledger.lease(spec.id) as holder:
        if holder is not None:
            outcome.elsewhere.append((spec, holder))
            view.say(f"{spec.name}: being run by {holder}")
            return
        if ledger.has(spec.id):
            outcome.skipped.append(spec)
            return
        view.begin(spec, *place)
        started, clock = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
        try:
            if trial.reason is not None:
                raise TautError(trial.reason)
            with _deadline(spec.seconds):
                record = trial.run(view.step)
            path = ledger.write(record)
        # Some libraries raise SystemExit as if they were a program.
        except (Exception, SystemExit) as error:
            log.debug("trial %s failed", spec.name, exc_info=True)
            if ledger.has(spec.id):
                outcome.skipped.append(spec)
                return
            record = spec.record(
                "failed",
                reason=_one_line(error),
                started=started,
                seconds=time.monotonic() - clock,
                environment=environment(),
            )
            path = ledger.write(record)
        view.end()
        outcome.ran.append(record)
        _show_result(record, path, view)


def _show_result(record: Record, path: Path, view: Display) -> None:
    if record.status == "failed":
        how = " as expected" if record.expect == "failed" else ""
        view.say(f"  failed{how}: {record.trial}: {record.reason}  [{path.name}]")
        return
    scores = "  ".join(f"{score.metric} {_number(score.quantity.value)}" for score in record.scores)
    surprise = "  (the study expected it to fail)" if record.expect == "failed" else ""
    view.say(f"  done: {record.trial}: {scores}  {_duration(record.seconds)}{surprise}")


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Raise TautError in the trial after ``seconds``. Needs signals: the main thread, and not Windows."""
    able = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
    if seconds is None or not able:
        yield
        return

    def stop(*_: Any) -> None:
        raise TautError(f"stopped after {seconds:g} s, the limit of the study")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory() -> int:
    """Bytes of memory that are free now: on the machine, or within the container's limit if that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The file cache counts as used there, but the system frees it on demand.
        used = int((group / "memory.current").read_text()) - int(counts["file"])
    except (OSError, ValueError, KeyError):
        return free
    return min(free, limit - used)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, TautError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

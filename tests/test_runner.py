"""The runner: resumes, survives, and never lets one trial end the run. Trials are fakes; nothing here is timed."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from sample_records import record

from taut.core.errors import TautError
from taut.core.record import Quantity, Record
from taut.core.spec import TrialSpec
from taut.studies import runner
from taut.studies.display import LiveDisplay, PlainDisplay
from taut.studies.ledger import Ledger
from taut.studies.study import Study

STUDY = Study.parse(
    {
        "name": "fake",
        "models": ["m"],
        "recipes": {f"r{keep}": {"embedding": {"method": "low_rank", "keep": keep / 10}} for keep in (1, 2, 3)}
        | {"fails": {"expect": "failed", "memory": "window_sink"}},
    }
)
SCRIPT = """
import os, sys, time
from pathlib import Path
from sample_records import record
from test_runner import STUDY, Fake
from taut.studies import runner
from taut.studies.display import PlainDisplay
from taut.studies.ledger import Ledger

class Slow(Fake):
    def run(self, spec, report):
        if spec.recipe_name == "r2":
            Path(sys.argv[2]).touch()
            time.sleep(60)
        return super().run(spec, report)

outcome = runner.run(STUDY, Ledger(sys.argv[1]), Slow(), PlainDisplay())
sys.exit(outcome.exit_code)
"""


class Fake:
    """Prepares trials without models. ``on`` maps recipe names to what happens instead of success."""

    def __init__(
        self, on: dict[str, Callable[[TrialSpec], Record]] | None = None, need: dict[str, float] | None = None
    ):
        self.on, self.need = on or {}, need or {}
        self.ran: list[str] = []

    def __call__(self, spec: TrialSpec) -> "Ready":
        return Ready(self, spec)

    def validate(self, spec: TrialSpec) -> str | None:
        return "memory: an encoder keeps no cache" if "memory" in spec.recipe else None

    def estimate(self, spec: TrialSpec) -> dict[str, float]:
        return {"seconds": 2.0, "bytes": self.need.get(spec.recipe_name, 1e6)}

    def run(self, spec: TrialSpec, report: Callable[[str], None]) -> Record:
        self.ran.append(spec.recipe_name)
        report("working")
        return self.on.get(spec.recipe_name, record)(spec)


def raising(error: BaseException) -> Callable[[TrialSpec], Record]:
    def happen(spec: TrialSpec) -> Record:
        raise error

    return happen


class Ready:
    """A trial of a Fake."""

    def __init__(self, fake: Fake, spec: TrialSpec) -> None:
        self.fake, self.spec, self.reason = fake, spec, fake.validate(spec)

    def estimate(self) -> dict[str, float]:
        return self.fake.estimate(self.spec)

    def run(self, report: Callable[[str], None]) -> Record:
        return self.fake.run(self.spec, report)


def run(path: Path, fake: Fake | None = None, study: Study = STUDY) -> tuple[runner.Outcome, str]:
    stream = io.StringIO()
    outcome = runner.run(study, Ledger(path), fake or Fake(), PlainDisplay(stream))
    return outcome, stream.getvalue()


def test_a_run_writes_one_record_a_trial_and_says_so(tmp_path: Path) -> None:
    outcome, output = run(tmp_path)
    records = Ledger(tmp_path).records()
    assert {one.id for one in records} == {spec.id for spec in STUDY.trials()}
    assert len(outcome.ran) == 6
    assert (outcome.exit_code, outcome.unexpected) == (0, [])
    assert "6 trials to run, about 10 s" in output
    assert "failed as expected: m · fails · seed 0: memory: an encoder keeps no cache" in output
    assert output.splitlines()[-1] == "6 trials: 5 done, 1 failed as expected"
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"], "no leases, no drafts"


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fake = Fake()
    outcome, output = run(tmp_path, fake)
    assert fake.ran == []
    assert len(outcome.skipped) == len(outcome.records) == 6
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "(6 were in the ledger already)" in output


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("two\nlines  of it"), "RuntimeError: two lines of it"),
        (TautError("a clear line"), "a clear line"),
        (MemoryError(), "MemoryError"),
        (SystemExit(3), "SystemExit: 3"),
        (ValueError("x" * 5000), "ValueError: xxx"),
    ],
)
def test_a_trial_that_crashes_is_a_record_with_a_reason(tmp_path: Path, error: BaseException, reason: str) -> None:
    outcome, output = run(tmp_path, Fake({"r1": raising(error)}))
    (failed,) = outcome.unexpected
    assert failed.reason.startswith(reason)
    assert "\n" not in failed.reason
    assert len(failed.reason) <= runner.LONGEST_REASON
    assert failed.environment["packages"]["taut"]
    assert outcome.exit_code == 1
    assert len(outcome.records) == 6
    assert failed.reason in output


def test_a_record_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    def broken(spec: TrialSpec) -> Record:
        return record(spec, costs={"energy_joules": Quantity(value=1.0, unit="J", how="", samples=(float("nan"),))})

    outcome, _ = run(tmp_path, Fake({"r1": broken}))
    assert "would not be readable" in outcome.unexpected[0].reason
    assert Ledger(tmp_path).damaged() == []


def test_a_surprise_is_told(tmp_path: Path) -> None:
    class Works(Fake):
        def validate(self, spec: TrialSpec) -> str | None:
            return None

    outcome, output = run(tmp_path, Works())
    assert outcome.exit_code == 0
    assert "the study expected it to fail" in output


def test_wrong_input_ends_the_run_before_the_first_trial(tmp_path: Path) -> None:
    class Wrong(Fake):
        def validate(self, spec: TrialSpec) -> str | None:
            if spec.recipe_name == "r3":
                raise TautError("low_rank has no knob 'rang'")
            return None

    fake = Wrong()
    with pytest.raises(TautError, match="rang"):
        run(tmp_path / "ledger", fake)
    assert fake.ran == []
    assert not (tmp_path / "ledger").exists()


def test_a_study_none_of_whose_recipes_can_work_is_wrong_input(tmp_path: Path) -> None:
    class Hopeless(Fake):
        def validate(self, spec: TrialSpec) -> str | None:
            return "fits nothing" if spec.recipe_name.startswith("r") else None

    with pytest.raises(TautError, match="no recipe can work; the first: m · r1 · seed 0: fits nothing"):
        run(tmp_path / "ledger", Hopeless())
    assert not (tmp_path / "ledger").exists()


def test_a_trial_without_memory_is_refused_and_not_recorded(tmp_path: Path) -> None:
    fake = Fake(need={"r2": 1e18})
    outcome, output = run(tmp_path, fake)
    ((spec, reason),) = outcome.refused
    assert spec.recipe_name == "r2"
    assert "needs about 1000000000.0 GB" in reason
    assert "r2" not in fake.ran
    assert outcome.exit_code == 1
    assert "refused: m · r2 · seed 0" in output
    assert not Ledger(tmp_path).has(spec.id), "on a larger machine it runs"
    limited = STUDY.model_copy(update={"limits": STUDY.limits.model_copy(update={"ram": 10})})
    with pytest.raises(TautError, match="is the limit of the study"):
        run(tmp_path / "other", Fake(), limited.model_copy(update={"recipes": {"dense": STUDY.recipes["dense"]}}))


def test_ctrl_c_leaves_whole_records_and_goes_on_from_there(tmp_path: Path) -> None:
    outcome, output = run(tmp_path, Fake({"r2": raising(KeyboardInterrupt())}))
    assert outcome.exit_code == 130
    assert "repeat the command to continue" in output
    assert [one.recipe_name for one in Ledger(tmp_path).records()] == [one.recipe_name for one in outcome.records]
    assert len(outcome.records) == 3
    assert not list(tmp_path.glob("*.lease"))
    fake = Fake()
    outcome, _ = run(tmp_path, fake)
    assert fake.ran == ["r2", "r3"]
    assert outcome.exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_a_real_process_is_interrupted_or_killed(tmp_path: Path, blow: signal.Signals) -> None:
    ledger, mark = tmp_path / "ledger", tmp_path / "mark"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, str(ledger), str(mark)]

    def hear_interrupts() -> None:
        """Interrupts are ignored in the background jobs of a script; here they must count."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hear_interrupts
    ) as child:
        deadline = time.monotonic() + 60
        while not mark.exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.02)
        assert mark.exists(), child.stderr.read()
        child.send_signal(blow)
        output = child.communicate(timeout=180)[1]
    killed = blow == signal.SIGKILL
    assert child.returncode == (-blow if killed else 130)
    assert ("interrupted" in output) != killed
    assert bool(list(ledger.glob("*.lease"))) == killed, "kill -9 leaves its lease behind"
    assert Ledger(ledger).damaged() == []
    before = {path: path.read_bytes() for path in ledger.glob("*.json")}
    assert len(before) == 3
    fake = Fake()
    outcome, _ = run(ledger, fake)
    assert fake.ran == ["r2", "r3"]
    assert len(outcome.records) == 6
    assert {path: path.read_bytes() for path in before} == before
    assert not list(ledger.glob("*.lease"))


def test_two_runners_share_the_work(tmp_path: Path) -> None:
    second, runs = Fake(), []

    def meanwhile(spec: TrialSpec) -> Record:
        runs.append(run(tmp_path, second))
        return record(spec)

    first = Fake({"r1": meanwhile})
    outcome, _ = run(tmp_path, first)
    inner, output = runs[0]
    ((spec, holder),) = inner.elsewhere
    assert spec.recipe_name == "r1"
    assert str(os.getpid()) in holder
    assert "being run by" in output
    assert "1 left to another runner" in output
    assert first.ran == ["identity", "dense", "r1"] or first.ran == ["dense", "identity", "r1"]
    assert second.ran == ["r2", "r3"]
    assert len(outcome.records) == 6


def test_a_damaged_record_is_named_and_its_trial_run_again(tmp_path: Path) -> None:
    run(tmp_path)
    spec = STUDY.trials()[2]
    path = tmp_path / f"{spec.id}.json"
    path.write_text(path.read_text()[:100])
    fake = Fake()
    outcome, output = run(tmp_path, fake)
    assert fake.ran == [spec.recipe_name]
    assert f"damaged record skipped: {path}" in output
    assert len(path.read_text()) == 100
    assert len(outcome.records) == 6


def test_a_trial_is_stopped_at_its_limit_of_time(tmp_path: Path) -> None:
    def endless(spec: TrialSpec) -> Record:
        while True:
            time.sleep(0.01)

    study = STUDY.model_copy(update={"limits": STUDY.limits.model_copy(update={"seconds": 0.2})})
    outcome, _ = run(tmp_path, Fake({"r1": endless}), study)
    assert outcome.unexpected[0].reason == "stopped after 0.2 s, the limit of the study"
    assert len(outcome.records) == 6
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_run_outside_the_main_thread_works(tmp_path: Path) -> None:
    study = STUDY.model_copy(update={"limits": STUDY.limits.model_copy(update={"seconds": 30.0})})
    outcomes: list[runner.Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(tmp_path, study=study)[0]))
    thread.start()
    thread.join()
    assert len(outcomes[0].records) == 6


@pytest.mark.parametrize(
    ("done", "expected", "failed", "fields", "sentence", "code"),
    [
        (3, 0, 0, {}, "3 trials: 3 done", 0),
        (1, 1, 0, {}, "2 trials: 1 done, 1 failed as expected", 0),
        (1, 1, 2, {}, "4 trials: 1 done, 1 failed as expected, 2 failed", 1),
        (1, 0, 0, {"refused": 2}, "3 trials: 1 done, 2 refused for memory", 1),
        (1, 0, 0, {"elsewhere": 1}, "2 trials: 1 done, 1 left to another runner", 0),
        (2, 0, 0, {"skipped": 2}, "2 trials: 2 done (2 were in the ledger already)", 0),
        (1, 0, 1, {"interrupted": True, "open": 3}, "5 trials: 1 done, 1 failed, 3 not finished", 130),
        (0, 0, 0, {"elsewhere": 1, "open": 1}, "2 trials: 1 left to another runner, 1 not finished", 0),
    ],
)
def test_how_a_run_ended_in_one_line(
    done: int, expected: int, failed: int, fields: dict, sentence: str, code: int
) -> None:
    spec = STUDY.trials()[0]
    records = [record() for _ in range(done)]
    for count, expect in ((expected, "failed"), (failed, "done")):
        trial = spec.model_copy(update={"expect": expect})
        records += [trial.record("failed", reason="why") for _ in range(count)]
    pairs = {name: [(spec, "why")] * fields.get(name, 0) for name in ("elsewhere", "refused")}
    outcome = runner.Outcome(
        "s",
        Path("l"),
        len(records) + fields.get("elsewhere", 0) + fields.get("refused", 0) + fields.get("open", 0),
        records,
        skipped=[spec] * fields.get("skipped", 0),
        interrupted=fields.get("interrupted", False),
        **pairs,
    )
    assert (outcome.sentence(), outcome.exit_code, len(outcome.unexpected)) == (sentence, code, failed)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (150, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (9000, "2.5 h")],
)
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert runner._duration(seconds) == text


def test_numbers_of_the_run_as_people_read_them() -> None:
    assert [runner._number(value) for value in (None, 0.0, 0.123456, 1234.56)] == ["n/a", "0", "0.1235", "1235"]
    assert [runner._gigabytes(size) for size in (0, 1.25e9, 1e12)] == ["0.0 GB", "1.2 GB", "1000.0 GB"]


@pytest.mark.parametrize(("length", "shown"), [(400, 400), (401, 400), (5000, 400)])
def test_a_long_reason_ends_in_dots(length: int, shown: int) -> None:
    text = runner._one_line(TautError("x" * length))
    assert (len(text), text[-1]) == (shown, "x" if length <= 400 else "…")


def test_a_trial_may_need_all_that_its_limit_allows(tmp_path: Path) -> None:
    limited = STUDY.model_copy(update={"limits": STUDY.limits.model_copy(update={"ram": 3_000_000})})
    outcome, output = run(tmp_path, Fake(need={"r1": 3e6, "r2": 3_000_001.0}), limited)
    assert [spec.recipe_name for spec, _ in outcome.refused] == ["r2"]
    assert outcome.refused[0][1] == "needs about 0.0 GB, and 0.0 GB is the limit of the study"
    assert "5 trials to run, about 8 s and 0.0 GB of memory" in output, "what fails needs no time"


def test_the_largest_need_is_told_and_what_is_there_already(tmp_path: Path) -> None:
    free = runner.free_memory()
    fake = Fake(need={"r1": free / 4, "r2": free / 3, "r3": 1.0})
    _, output = run(tmp_path, fake, STUDY.narrowed(["r1"]))
    assert f"3 trials to run, about 6 s and {free / 4e9:.1f} GB of memory" in output
    _, output = run(tmp_path, fake, STUDY.narrowed(["r1", "r2", "r3"]))
    assert f"2 trials to run, 3 more in the ledger, about 4 s and {free / 3e9:.1f} GB of memory" in output


def test_a_study_of_controls_alone_and_one_working_recipe_are_enough(tmp_path: Path) -> None:
    class One(Fake):
        def validate(self, spec: TrialSpec) -> str | None:
            return "fits nothing" if spec.recipe_name in ("r1", "r2", "fails") else None

    outcome, _ = run(tmp_path / "one", One())
    assert [one.recipe_name for one in outcome.unexpected] == ["r1", "r2"]
    outcome, _ = run(tmp_path / "controls", study=Study.parse({"models": ["m"]}))
    assert outcome.sentence() == "2 trials: 2 done"


def test_the_outcome_is_json(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path)
    content = json.loads(json.dumps(outcome.to_dict()))
    assert content["trials"] == 6
    assert {row["recipe"]: row["status"] for row in content["rows"]}["fails"] == "failed"
    row = next(row for row in content["rows"] if row["recipe"] == "r1")
    assert row["scores"]["docs_retrieval mrr@10"]["against_dense"]["verdict"] == "same"


def test_the_live_display_shows_names_as_they_are(tmp_path: Path) -> None:
    stream = io.StringIO()
    view = LiveDisplay(Console(file=stream, force_terminal=True, width=120))
    study = Study.parse({"name": "[red]", "models": ["m"], "recipes": {"[bold]x": {"embedding": "low_rank"}}})
    runner.run(study, Ledger(tmp_path), Fake(), view)
    assert "m · [bold]x · seed 0" in stream.getvalue()
    assert "3 trials: 3 done" in stream.getvalue()


def test_an_unwritable_ledger_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TautError, match="not writable"):
        run(tmp_path / "file" / "ledger")


def test_compare_needs_recipes_or_a_study(tmp_path: Path) -> None:
    with pytest.raises(TautError, match="--recipes light"):
        Study.read("minilm")
    with pytest.raises(TautError, match="a study's file says what to compare"):
        Study.read("study.yaml", ["light"])

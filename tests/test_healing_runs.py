"""What all training runs share: when a checkpoint is due, and what ends a run. The clock is one of our own."""

import pytest

from taut.healing import runs
from taut.healing.runs import Diverged, SaveClock, check_finite


def test_checkpoints_take_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    clock = SaveClock(30.0)
    now[0] = 129.0
    assert not clock.due
    now[0] = 130.0
    assert clock.due
    clock.note_writing(1.0)
    assert clock.seconds == 30.0
    # Two seconds of writing need forty of training.
    clock.note_writing(2.0)
    clock.restart()
    now[0] = 169.0
    assert not clock.due
    now[0] = 170.0
    assert clock.due


def test_a_clock_of_no_seconds_is_always_due() -> None:
    clock = SaveClock(0.0)
    clock.note_writing(5.0)
    assert clock.seconds == 0.0
    assert clock.due


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_a_run(value: float) -> None:
    check_finite({"loss": 1.0, "grad_norm": value}, 3)
    with pytest.raises(Diverged, match="the gradient's norm is (nan|inf) at step 3"):
        check_finite({"loss": 1.0, "grad_norm": value}, 3, ("loss", "grad_norm"))

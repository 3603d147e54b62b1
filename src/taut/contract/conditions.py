"""What a check needs of a case. It is decided on shapes, before any weight is made.

Each condition gives the reason why a case lacks something, or None.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from taut.contract.case import Case, skeleton
from taut.core.errors import TautError
from taut.core.registry import METHODS
from taut.methods.base import MemoryMethod, PartMethod
from taut.surgery.plan import Plan


def is_placed(case: Case) -> str | None:
    return case.misfit


def is_decoder(case: Case) -> str | None:
    return None if case.decoder else "an encoder is not causal and has no cache"


def steps_agree(case: Case) -> str | None:
    memories = (step.method for step in case.steps if isinstance(step.method, MemoryMethod))
    return next((method.unequal for method in memories if method.unequal), None)


def has_parts(case: Case) -> str | None:
    parts = any(isinstance(step.method, PartMethod) for step in case.steps)
    return None if parts else "no part with tensors of its own"


def is_counted(case: Case) -> str | None:
    parts = (step.method for step in case.steps if isinstance(step.method, PartMethod))
    return next((method.uncounted for method in parts if method.uncounted), None)


def has_a_dial(case: Case) -> str | None:
    if METHODS.get(case.method).dial is None:
        return "no dial"
    return None if len(plans_by_keep(case)) > 1 else "fewer than two values of keep are possible at this size"


def plans_by_keep(case: Case) -> list[Plan]:
    """The plans with ascending values of ``keep``, as far as they are possible."""
    dial = METHODS.get(case.method).dial
    entry = [(key, value) for key, value in case.entry if key not in (dial, "keep")]
    plans = []
    for keep in (0.25, 0.5, 0.75, 1.0):
        with suppress(TautError):
            changed = Case(case.method, case.family, (*entry, ("keep", keep)))
            plans.append(changed.planned(skeleton(case.family)))
    return plans


@dataclass(frozen=True)
class Check:
    """A check, and what it ``needs`` of a case: functions that give the reason why a case lacks it, or None."""

    run: Callable[..., None]
    needs: tuple[Callable[[Case], str | None], ...] = ()
    with_taut: bool | None = None
    """For checks in another process: whether taut is imported there."""

    def obstacle(self, case: Case) -> str | None:
        """Why the check does not apply to a case, or None. Decided on shapes; no weights are made."""
        return next((reason for need in (is_placed, *self.needs) if (reason := need(case))), None)


def named(*checks: Check) -> dict[str, Check]:
    """The checks by the names of their functions."""
    return {check.run.__name__: check for check in checks}

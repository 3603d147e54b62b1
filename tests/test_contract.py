"""The gate: every method, found by discovery, on every family."""

from collections.abc import Iterator
from itertools import cycle

import pytest

from taut.contract.case import Case, cases, rows
from taut.contract.checks import CHECKS, PROCESS_CHECKS
from taut.contract.conditions import Check
from taut.contract.tiny import FAMILIES, REPRESENTATIVES
from taut.contract.workers import Worker
from taut.core.registry import METHODS

SETTINGS = 2
"""Of each method's row on families that are no representatives, in the full cross."""


def in_turn(method: str) -> list[Case]:
    """The settings of a method go in turn over the representatives: each setting once, and each family once."""
    families = cycle(REPRESENTATIVES)
    chosen: list[Case] = []
    for entry in rows()[method]:
        fitting = [Case(method, next(families), tuple(entry.items())) for _ in REPRESENTATIVES]
        chosen += [case for case in fitting if case.misfit is None][:1]
        # The next setting begins with the family behind the one that was used.
        families = cycle(_after(chosen[-1].family)) if chosen else families
    missing = [family for family in REPRESENTATIVES if family not in {case.family for case in chosen}]
    return chosen + [case for family in missing for case in cases(method, (family,), rows()[method][:1])]


def _after(family: str) -> tuple[str, ...]:
    place = REPRESENTATIVES.index(family) + 1
    return REPRESENTATIVES[place:] + REPRESENTATIVES[:place]


def _each_case() -> Iterator[tuple[Case, bool]]:
    """Every case, and whether it is only for the full cross: those that are not in turn."""
    for method in METHODS.built_in():
        quick = in_turn(method)
        full = cases(method, tuple(FAMILIES), rows()[method][:SETTINGS]) + cases(method, REPRESENTATIVES)
        for case in {case.label: case for case in (*full, *quick)}.values():
            yield case, case not in quick


CASES = tuple(_each_case())


def _jobs(checks: dict[str, Check]) -> list:
    """Each check with each case that it applies to."""
    return [
        pytest.param(name, case, id=f"{name}-{case.label}", marks=pytest.mark.full if full else ())
        for case, full in CASES
        for name, check in checks.items()
        if check.obstacle(case) is None
    ]


@pytest.fixture(scope="session")
def workers() -> Iterator[dict[bool, Worker]]:
    opened = {flag: Worker(flag) for flag in (True, False)}
    yield opened
    for worker in opened.values():
        worker.close()


@pytest.mark.parametrize(("check", "case"), _jobs(CHECKS))
def test_contract(check: str, case: Case) -> None:
    CHECKS[check].run(case)


@pytest.mark.parametrize(("check", "case"), _jobs(PROCESS_CHECKS))
def test_contract_in_another_process(check: str, case: Case, workers: dict[bool, Worker]) -> None:
    PROCESS_CHECKS[check].run(case, workers[PROCESS_CHECKS[check].with_taut])


@pytest.mark.parametrize("method", METHODS.built_in())
def test_every_setting_fits_somewhere(method: str) -> None:
    for entry in rows()[method]:
        assert any(case.steps for case in cases(method, REPRESENTATIVES, [entry])), entry


def test_ids_are_the_rows() -> None:
    assert set(METHODS.built_in()) == set(rows())

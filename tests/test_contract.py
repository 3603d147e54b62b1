"""The gate: every method, found by discovery, on every family."""

from collections.abc import Iterator

import pytest

from taut.contract.case import Case, Skip, cases, rows
from taut.contract.checks import CHECKS, PROCESS_CHECKS
from taut.contract.tiny import FAMILIES, REPRESENTATIVES
from taut.contract.workers import Worker
from taut.core.registry import METHODS

OTHERS = tuple(family for family in FAMILIES if family not in REPRESENTATIVES)
SETTINGS = 2
"""Of each method's row on the other families; the representatives get the whole row."""


def _all_cases() -> list:
    quick = [case for method in METHODS.built_in() for case in cases(method, REPRESENTATIVES)]
    full = [case for method in METHODS.built_in() for case in cases(method, OTHERS, rows()[method][:SETTINGS])]
    marked = [pytest.param(case, id=case.label, marks=pytest.mark.full) for case in full]
    return [pytest.param(case, id=case.label) for case in quick] + marked


@pytest.fixture(scope="session")
def workers() -> Iterator[dict[bool, Worker]]:
    opened = {flag: Worker(flag) for flag in (True, False)}
    yield opened
    for worker in opened.values():
        worker.close()


@pytest.mark.parametrize("case", _all_cases())
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str, case: Case) -> None:
    try:
        CHECKS[check](case)
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", _all_cases())
@pytest.mark.parametrize("check", PROCESS_CHECKS)
def test_contract_in_another_process(check: str, case: Case, workers: dict[bool, Worker]) -> None:
    function, with_taut = PROCESS_CHECKS[check]
    try:
        function(case, workers[with_taut])
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("method", METHODS.built_in())
def test_no_method_is_skipped_everywhere(method: str) -> None:
    """A method whose every case was skipped is a failure."""
    placed = 0
    for case in cases(method, REPRESENTATIVES):
        try:
            placed += bool(case.planned(case.model()).steps)
        except Skip:
            continue
    assert placed


def test_ids_are_the_rows() -> None:
    assert set(METHODS.built_in()) == set(rows())

"""Runs the contract of one method, for ``taut check``."""

from typing import Any

from taut.contract.case import cases
from taut.contract.checks import CHECKS, PROCESS_CHECKS
from taut.contract.device_checks import DEVICE_CHECKS
from taut.contract.tiny import FAMILIES, REPRESENTATIVES
from taut.contract.workers import Worker
from taut.core.errors import TautError, nearest
from taut.core.registry import METHODS
from taut.surgery.loading import check_device


def run(
    method: str, families: tuple[str, ...] = (), knobs: dict[str, Any] | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Run every check on every case, and return a row for each.

    ``knobs`` replaces the method's own test entries. On a ``device`` other than the CPU, the checks that need other
    processes are left out, and the DEVICE_CHECKS are added. Raises TautError for an unknown method or family, and for a
    device that is not on this machine.
    """
    METHODS.get(method)
    for family in families:
        if family not in FAMILIES:
            raise TautError(f"unknown family {family!r}: {nearest(family, FAMILIES)}")
    here = check_device(device).type == "cpu"
    chosen = cases(method, families or REPRESENTATIVES, None if knobs is None else [knobs], device)
    workers = {flag: Worker(flag) for flag in (True, False) if here}
    checks = CHECKS | PROCESS_CHECKS if here else CHECKS | DEVICE_CHECKS
    rows = []
    try:
        for case in chosen:
            for name, check in checks.items():
                status, reason = "passed", ""
                try:
                    if obstacle := check.obstacle(case):
                        status, reason = "skipped", obstacle
                    else:
                        check.run(case, *(() if check.with_taut is None else (workers[check.with_taut],)))
                except Exception as error:
                    # A method under test may raise any error. It becomes a row, and the run continues.
                    status, reason = "failed", f"{type(error).__name__}: {error}".strip()
                rows.append({"check": name, "case": case.label, "status": status, "reason": reason})
    finally:
        for worker in workers.values():
            worker.close()
    return rows

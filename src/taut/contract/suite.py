"""Running the contract of one method, for ``taut check``."""

from typing import Any

from taut.contract.case import Skip, cases
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
    """A row for every check on every case. ``knobs`` replaces the method's own test row. On another ``device`` than the
    CPU the checks are those of one process, and that what happens there is what happens on the CPU.

    Raises TautError for an unknown method or family, and for a device that is not there.
    """
    METHODS.get(method)
    for family in families:
        if family not in FAMILIES:
            raise TautError(f"unknown family {family!r}: {nearest(family, FAMILIES)}")
    here = check_device(device).type == "cpu"
    chosen = cases(method, families or REPRESENTATIVES, None if knobs is None else [knobs], device)
    workers = {flag: Worker(flag) for flag in (True, False) if here}
    jobs = {name: (check, ()) for name, check in (CHECKS if here else CHECKS | DEVICE_CHECKS).items()}
    jobs |= {name: (check, (workers[flag],)) for name, (check, flag) in PROCESS_CHECKS.items() if here}
    rows = []
    try:
        for case in chosen:
            for name, (check, extra) in jobs.items():
                status, reason = "passed", ""
                try:
                    check(case, *extra)
                except Skip as skip:
                    status, reason = "skipped", str(skip)
                except Exception as error:
                    # A method under test may fail in any way; every way is a finding, none ends the run.
                    status, reason = "failed", f"{type(error).__name__}: {error}".strip()
                rows.append({"check": name, "case": case.label, "status": status, "reason": reason})
    finally:
        for worker in workers.values():
            worker.close()
    return rows

"""What every benchmark shares: one claim a file, a table on the screen, a record with raw samples on disk.

A benchmark file holds ``CLAIM`` and ``main()`` and runs alone: ``python benchmarks/x.py [--quick]``. With ``--quick``
it does little work, prints, and writes no record: a quick run is a check of the file, not a measurement.
"""

import argparse
import atexit
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from taut.core.environment import environment
from taut.core.record import Quantity
from taut.measurement.clock import Timing, ratio
from taut.measurement.kernels import kernel_path

RECORDS = Path(__file__).parent / "records"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def options(claim: str, **extra: Any) -> argparse.Namespace:
    """``--quick``, ``--device`` and one option for each of ``extra`` (its default gives the type)."""
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--quick", action="store_true", help="little work, no record written")
    parser.add_argument("--device", default="cpu")
    for name, default in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def against(dense: Timing, ours: Timing, at_least: float | None = None, **where: Any) -> dict[str, Any]:
    """One row: how many times faster ``ours`` is than ``dense``, with the interval and the raw samples of both.

    ``holds`` is True when the whole 95 % interval lies at or above ``at_least``.
    """
    speedup = ratio(dense, ours)
    row = {**where, "dense ms": dense.median * 1e3, "ours ms": ours.median * 1e3, "faster": speedup}
    if at_least is not None:
        row |= {"target": at_least, "holds": speedup.low is not None and speedup.low >= at_least}
    return row | {"dense": dense.quantity(), "ours": ours.quantity()}


def record(
    name: str,
    claim: str,
    rows: Sequence[dict[str, Any]],
    passed: bool | None,
    notes: str = "",
    quick: bool = False,
    device: str = "cpu",
) -> int:
    """Print ``rows`` as tables, one for each set of columns; write ``records/<name>.json`` unless ``quick``. Of another
    device than the CPU it is ``records/<name>-<device>.json``. Quantities keep their raw samples.

    ``passed`` None: nothing was promised. Returns the exit status: 1 when a promise was not kept.
    """
    kind = torch.device(device).type
    name = name if kind == "cpu" else f"{name}-{kind}"
    console = Console(width=max(Console().width, 120))
    console.print(claim)
    for group in _alike(rows):
        table = Table()
        columns = [key for key in dict.fromkeys(key for row in group for key in row) if not _raw(group, key)]
        for column in columns:
            table.add_column(column, justify="right")
        for row in group:
            table.add_row(*(_shown(row.get(column)) for column in columns))
        console.print(table)
    console.print(notes)
    verdict = {True: "holds", False: "does NOT hold", None: "no promise"}[passed]
    console.print(f"{name}: {verdict}{' (quick run: no record)' if quick else ''}")
    if not quick:
        # Of a whole path the last part: the rest says something of one machine only.
        words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
        content = {
            "name": name,
            "claim": claim,
            "passed": passed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.argv[0]).name, *words]),
            "environment": environment(torch.get_num_threads()) | {"kernels": kernel_path(device)},
            "notes": notes,
            "rows": rows,
        }
        RECORDS.mkdir(exist_ok=True)
        (RECORDS / f"{name}.json").write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    return 0 if passed is not False or quick else 1


def peer(*packages: str) -> Path:
    """Install other people's packages for this run alone and make them importable; returns the folder they are in.

    The folder is temporary and outside the repository, and gone when the benchmark ends. Nothing they depend on comes
    along, so torch stays what it is: name what is needed (``peer("tensorly-torch", "tensorly")``). Ends the benchmark
    with one line when they cannot be had.
    """
    folder = tempfile.mkdtemp(prefix="taut-peer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "-c", str(CONSTRAINTS), "--target", folder, *packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"pip ended with {done.returncode}").splitlines()[-1]
        raise SystemExit(f"cannot install {', '.join(packages)} to compare with: {reason}")
    sys.path.append(folder)
    return Path(folder)


@contextmanager
def seen(folder: str, key: str) -> Iterator[dict[str, Any]]:
    """What an earlier run left in ``folder`` under ``key``, or an empty dict to fill, which is kept unless the block
    fails. No folder, no memory."""
    path = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = json.loads(path.read_text()) if folder and path.is_file() else {}
    yield known
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))


def _alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that measure the same: all columns of one are among those of the others, or the other way round."""
    groups: list[tuple[set[str], list[dict[str, Any]]]] = []
    for row in rows:
        columns, group = next((each for each in groups if each[0] <= set(row) or each[0] >= set(row)), (set(), []))
        if not group:
            groups.append((columns, group))
        columns |= set(row)
        group.append(row)
    return [group for _, group in groups]


def _raw(rows: Sequence[dict[str, Any]], key: str) -> bool:
    """Timings stand in the record with their samples; in the table their medians are enough."""
    values = [row[key] for row in rows if key in row]
    return all(isinstance(value, Quantity) and value.unit == "s" for value in values)


def _shown(value: Any) -> str:
    if isinstance(value, Quantity):
        interval = f" [{value.low:.3g}, {value.high:.3g}]" if value.low is not None else ""
        return "-" if value.value is None else f"{value.value:.4g} {value.unit}{interval}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Timing):
        return value.quantity().model_dump()
    raise TypeError(f"a record holds numbers, text and quantities, not {type(value).__name__}")

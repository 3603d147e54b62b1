"""Runs a function in a fresh process: its memory starts from zero, and its crash ends only that process.

The function is named by a dotted path; its arguments and its result are JSON.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taut.core.errors import TautError


class SandboxError(Exception):
    """The function failed, ran out of time or memory, or its process was killed. ``stderr`` holds what it printed."""

    def __init__(self, reason: str, stderr: str = "") -> None:
        super().__init__(reason)
        self.reason, self.stderr = reason, stderr


@dataclass(frozen=True)
class Outcome:
    """The result of the function, the peak resident bytes of its whole process, and its seconds, start included."""

    result: dict[str, Any]
    peak_bytes: int
    seconds: float


def call(target: str, arguments: dict[str, Any] | None = None, timeout: float | None = None) -> Outcome:
    """Run ``module:function`` with keyword ``arguments`` in a fresh process.

    The output of the function is shown only in an error. The process ends when this one ends, for any reason.
    Raises TautError if the function raises it or if ``target`` names no function. Raises SandboxError with the reason
    for any other failure, including ``timeout`` (seconds) and a kill by the system when memory runs out.
    """
    request = json.dumps({"target": target, "arguments": arguments or {}}) + "\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="taut-") as folder:
        answer, printed = Path(folder, "answer.json"), Path(folder, "printed")
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "taut.measurement.sandbox", str(answer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(request.encode())
                    process.stdin.flush()
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise SandboxError(f"{target}: not done after {timeout:g} s", _tail(printed)) from None
            finally:
                _end(process)
        stderr = _tail(printed)
        if process.returncode != 0 or not answer.exists():
            raise SandboxError(f"{target}: {_cause(process.returncode)}", stderr)
        reply = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in reply:
        if reply["ours"]:
            raise TautError(reply["error"])
        raise SandboxError(f"{target}: {reply['error']}", stderr)
    return Outcome(reply["result"], reply["peak_bytes"], time.monotonic() - started)


def peak_bytes() -> int:
    """The most resident memory this process has had, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # ru_maxrss is no use here: on Linux a child starts with the peak of its parent.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _end(process: subprocess.Popen) -> None:
    """Kill the process and the processes that it started, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _tail(printed: Path, most: int = 4000) -> str:
    return printed.read_text(encoding="utf-8", errors="replace")[-most:]


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), most likely because the machine ran out of memory"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and no answer"


def _main(answer: Path) -> None:
    """Run in the child: read the request, call the function, write the answer complete or not at all."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reply: dict[str, Any]
    try:
        module, _, name = request["target"].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise TautError(f"{request['target']!r} names no function; expected module:function: {error}") from None
        result = function(**request["arguments"])
        reply = {"result": result, "peak_bytes": peak_bytes()}
        text = json.dumps(reply)
    except Exception as error:
        traceback.print_exc()
        ours = isinstance(error, TautError)
        lines = str(error).splitlines() or [""]
        text = json.dumps({"ours": ours, "error": str(error) if ours else f"{type(error).__name__}: {lines[0]}"})
    partial = answer.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(answer)


def _end_with_parent() -> None:
    """End this process when stdin closes: the parent keeps it open as long as it lives, even if killed by kill -9."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

"""Runs another program with taut imported, so that it opens compressed folders."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from taut.core.errors import TautError

START = """\
import sys
here = {here!r}
sys.path[:] = [path for path in sys.path if path != here]
ours = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ImportError:
    # Python expects to find the module that it is importing.
    sys.modules["sitecustomize"] = ours
import taut
"""


def run(command: list[str]) -> int:
    """Run a command and return its exit code. Every Python that it starts imports taut first.

    A ``sitecustomize`` module on ``PYTHONPATH`` does that; one that was there before still runs. Raises TautError if
    the command does not exist or cannot be executed.
    """
    with tempfile.TemporaryDirectory(prefix="taut-run-") as here:
        Path(here, "sitecustomize.py").write_text(START.format(here=here))
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(folders)}
        try:
            return subprocess.run(command, env=environment).returncode
        except FileNotFoundError:
            raise TautError(f"run: no such command: {command[0]!r}") from None
        except PermissionError:
            raise TautError(f"run: {command[0]!r} cannot be executed") from None

"""What the tests of the sandbox run in a new process: JSON in, JSON out, and nothing heavy to import."""

import os
import signal
import sys
import time

from taut.core.errors import TautError


def multiply(a: float, b: float) -> dict:
    print("this must not reach anybody")
    return {"product": a * b}


def fail(kind: str) -> dict:
    print("last words", file=sys.stderr, flush=True)
    if kind == "mistake":
        raise TautError("one line for the user")
    if kind == "crash":
        raise ZeroDivisionError("nothing by nothing")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "left":
        os._exit(3)
    return {"not JSON": object()}


def sleep(seconds: float, marker: str) -> dict:
    with open(marker, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(seconds)
    return {}


def fill(mebibytes: int) -> dict:
    """The bytes that a block needs when it fills this much memory."""
    import torch

    from taut.measurement import memory

    with memory.watch() as peak:
        kept = torch.ones(mebibytes * 2**20 // 4)
    return {"extra": peak.extra, "last": kept[-1].item()}

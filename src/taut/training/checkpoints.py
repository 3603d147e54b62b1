"""The folder beside the output that a run goes on from: whose it is, and what in it is whole."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

from taut.core.errors import TautError
from taut.healing.runs import FINISHED, newest
from taut.training.spec import TrainSpec

RUN = "run.json"
"""Whose state it is."""
FULL = ("No space left", "PytorchStreamWriter failed writing", "os error 28")
"""How libraries say that a disk is full when they do not raise OSError."""


def claim(state: Path, spec: TrainSpec, text: str) -> None:
    """Make the folder, or take over what an earlier run of the same spec left; what was cut off is removed. ``text`` is
    the hash of what is learned from. Raises TautError for another run's folder."""
    check(state, spec, text)
    if state.is_dir() and newest(state) is None:
        # Nothing was learned there: neither its spec nor its tokenizer binds anybody.
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    # Under its name only when it is whole: a kill may come at any time.
    fresh = state / f"{RUN}.new"
    fresh.write_text(json.dumps({"spec": spec.to_dict(), "text": text}, sort_keys=True))
    fresh.replace(state / RUN)
    remove_cut_off(state)


def check(state: Path, spec: TrainSpec, text: str) -> None:
    """Raises TautError when the folder belongs to another run that has learned something, naming the difference."""
    if not (state / RUN).is_file() or newest(state) is None:
        return
    other = json.loads((state / RUN).read_text())
    change = spec.change(other["spec"])
    if change is None and other["text"] != text:
        change = f"the text {', '.join(spec.text)} has another content now"
    if change is not None:
        raise TautError(f"{state}: holds another training run: {change}; remove it, or choose another --out")


def remove_cut_off(state: Path) -> None:
    """Leave the newest checkpoint that was written to its end, and nothing else of that kind."""
    whole = newest(state)
    for path in map(Path, sort_checkpoints(str(state))):
        if path != whole:
            shutil.rmtree(path)


def history(checkpoint: Path | None) -> list[dict[str, Any]]:
    """What was logged up to a checkpoint."""
    return [] if checkpoint is None else TrainerState.load_from_json(str(checkpoint / FINISHED)).log_history


@contextmanager
def disk_full_told(state: Path) -> Iterator[None]:
    """A full disk is one line for the user; the half of a checkpoint that was written is removed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(words in str(error) for words in FULL):
            raise
        remove_cut_off(state)
        last = newest(state)
        kept = f"the checkpoint of step {last.name.rpartition('-')[2]} is whole" if last else "no checkpoint was there"
        raise TautError(
            f"{state}: the disk is full; {kept}: free some space, and the same command goes on from there"
        ) from None

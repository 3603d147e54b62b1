"""The state folder beside the output: which run it belongs to, and which of its checkpoints are complete."""

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
"""The file that says which run the state belongs to."""
VERSION = 2
"""Of the state. Version 1, without a number in the file, names the files of carried memory otherwise."""
FULL = ("No space left", "PytorchStreamWriter failed writing", "os error 28")
"""Words in the errors of libraries that do not raise OSError when the disk is full."""


def claim(state: Path, spec: TrainSpec, text: str) -> None:
    """Make the folder, or take over that of an earlier run of the same spec. Incomplete checkpoints are removed.

    ``text`` is the hash of the corpus. Raises TautError for another run's folder.
    """
    check(state, spec, text)
    if state.is_dir() and newest(state) is None:
        # Without a checkpoint, nothing there is worth keeping, neither the spec nor the tokenizer.
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    # Renamed only when it is complete, because the process may be killed at any time.
    partial = state / f"{RUN}.new"
    partial.write_text(json.dumps({"version": VERSION, "spec": spec.to_dict(), "text": text}, sort_keys=True))
    partial.replace(state / RUN)
    remove_cut_off(state)


def check(state: Path, spec: TrainSpec, text: str) -> None:
    """Raises TautError if the folder holds a checkpoint of another run, with the difference, or of another version."""
    if not (state / RUN).is_file() or newest(state) is None:
        return
    other = json.loads((state / RUN).read_text())
    if other.get("version", 1) != VERSION:
        raise TautError(f"{state}: a training state of another version of taut; remove it to start again")
    change = spec.change(other["spec"])
    if change is None and other["text"] != text:
        change = f"the text {', '.join(spec.text)} has changed"
    if change is not None:
        raise TautError(f"{state}: holds another training run: {change}; remove it, or choose another --out")


def remove_cut_off(state: Path) -> None:
    """Remove all checkpoints but the newest complete one."""
    whole = newest(state)
    for path in map(Path, sort_checkpoints(str(state))):
        if path != whole:
            shutil.rmtree(path)


def history(checkpoint: Path | None) -> list[dict[str, Any]]:
    """What Trainer logged up to a checkpoint; nothing without one."""
    return [] if checkpoint is None else TrainerState.load_from_json(str(checkpoint / FINISHED)).log_history


@contextmanager
def explain_full_disk(state: Path) -> Iterator[None]:
    """Turn the error of a full disk into a TautError of one line, and remove a partly written checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(words in str(error) for words in FULL):
            raise
        remove_cut_off(state)
        last = newest(state)
        kept = f"the checkpoint of step {last.name.rpartition('-')[2]} is whole" if last else "there is no checkpoint"
        raise TautError(
            f"{state}: the disk is full; {kept}: free some space, and the same command goes on from there"
        ) from None

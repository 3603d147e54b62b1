"""What all runs of transformers.Trainer in taut share: the settings, when to save, and what ends a run."""

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from taut.core.errors import TautError

FINISHED = "trainer_state.json"
"""The file that Trainer writes last: a checkpoint without it was cut off."""
SHARE = 20
"""Writing checkpoints takes at most one part in this many of the time."""


class Diverged(TautError):
    """The loss, its gradient or a weight is no longer finite."""


class SaveClock:
    """When to write a checkpoint: every ``seconds`` (0: after every step), or less often where writing takes long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.seconds

    def restart(self) -> None:
        """Count the seconds from now on."""
        self.saved_at = time.monotonic()

    def note_writing(self, took: float) -> None:
        """A checkpoint took this many seconds to write."""
        self.seconds = self.seconds and max(self.seconds, SHARE * took)


def training_arguments(folder: Path, device: str, *, steps: int, seed: int, **options: Any) -> TrainingArguments:
    """Settings for ``steps`` steps over rows in their order. Every loss is logged, and Trainer saves only on request.

    ``device`` is a type such as ``cpu``. ``options`` are further fields of TrainingArguments.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        seed=seed,
        use_cpu=device == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=1,
        disable_tqdm=True,
        **options,
    )
    # With several visible GPUs Trainer would put a copy on each (DataParallel). Use torchrun for several GPUs.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def check_finite(logs: dict[str, Any], step: int, names: tuple[str, ...] = ("loss",)) -> None:
    """Raises Diverged when one of the logged numbers ``names`` (``loss``, ``grad_norm``) is not finite."""
    words = {"loss": "the loss", "grad_norm": "the gradient's norm"}
    for name in names:
        if not math.isfinite(logs.get(name, 0.0)):
            raise Diverged(f"{words[name]} is {logs[name]} at step {step}")


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written to its end."""
    for path in reversed(sort_checkpoints(str(folder))):
        try:
            json.loads((Path(path) / FINISHED).read_text())
        except (OSError, ValueError):
            continue
        return Path(path)
    return None


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of torch, Python and NumPy afterwards, because Trainer seeds them all."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)

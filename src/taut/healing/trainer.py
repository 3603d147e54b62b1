"""transformers.Trainer, told to train a Distillation and nothing else."""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import sort_checkpoints

from taut.core.errors import TautError
from taut.healing.distil import Distillation
from taut.healing.settings import Healing

Progress = Callable[[int, int], None]
FINISHED = "trainer_state.json"
"""The file that Trainer writes last: a checkpoint without it was cut off."""
SHARE = 20
"""Checkpoints take at most one part in this many of the time."""


def train(
    task: Distillation,
    optimizer: torch.optim.Optimizer,
    choices: Healing,
    folder: Path,
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> list[float]:
    """Run all steps, or those that the newest whole checkpoint in ``folder`` lacks; the loss of every step.

    A checkpoint is written every ``seconds`` (0: after every step), or less often where writing would take more than a
    twentieth of the time. Torch's, Python's and NumPy's random states are as before afterwards. Raises TautError when
    the loss is no longer finite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=choices.steps,
        per_device_train_batch_size=1,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(choices.warmup * choices.steps),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=task.trained[0].device.type == "cpu",
        seed=choices.seed,
    )
    device = task.trained[0].device
    if (arguments.device.type, arguments.device.index or 0) != (device.type, device.index or 0):
        raise TautError(f"healing: the model is on {device}, and Trainer trains on {arguments.device}; move the model")
    # Several visible GPUs would each get a copy of the task (DataParallel), which is not wanted.
    arguments._n_gpu = min(1, arguments.n_gpu)
    with random_states_kept():
        trainer = Trainer(
            task,
            arguments,
            data_collator=_only,
            train_dataset=_Steps(choices.steps),
            optimizers=(optimizer, None),
            callbacks=[_Watch(seconds, progress)],
        )
        trainer.remove_callback(PrinterCallback)
        last = newest(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def optimizer(trained: Mapping[nn.Parameter, float], rate: float) -> torch.optim.Optimizer:
    """Adam whose rate for a tensor is ``rate`` times the size that ``trained`` gives it.

    Adam's steps do not shrink with the gradient: codebooks, norms and tables differ in scale by orders of magnitude,
    and steps that suit a table in 2 bits would spoil one in 8.
    """
    groups = [{"params": [tensor], "lr": rate * size} for tensor, size in trained.items()]
    # Gradients of single numbers shrink with width and batch, so the usual 1e-8 would stop large models.
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-15)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written to its end."""
    for path in reversed(sort_checkpoints(str(folder))):
        try:
            json.loads((Path(path) / FINISHED).read_text())
        except (OSError, ValueError):
            continue
        return Path(path)
    return None


class _Steps(Dataset):
    """The numbers of the steps; what a step does follows from its number alone."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> int:
        return step


def _only(items: list[int]) -> dict[str, int]:
    (step,) = items
    return {"step": step}


class _Watch(TrainerCallback):
    """Progress, checkpoints by the clock, and an end to what has diverged."""

    def __init__(self, seconds: float, progress: Progress | None) -> None:
        self.seconds, self.progress = seconds, progress
        self.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)
        if time.monotonic() - self.started >= self.seconds and state.global_step < state.max_steps:
            control.should_save = True
            self.started = time.monotonic()
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        took = time.monotonic() - self.started
        self.seconds, self.started = self.seconds and max(self.seconds, SHARE * took), time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TautError(f"healing: the loss is {logs['loss']} at step {state.global_step}; lower learning_rate")


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Trainer seeds every generator of the process."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)

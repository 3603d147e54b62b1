"""transformers.Trainer for Distillation."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.healing.distil import Distillation
from taut.healing.runs import Diverged, SaveClock, check_finite, newest, random_states_kept, training_arguments
from taut.healing.settings import Healing


def train(
    task: Distillation,
    optimizer: torch.optim.Optimizer,
    choices: Healing,
    folder: Path,
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> list[float]:
    """Run all steps, or those after the newest complete checkpoint in ``folder``. Return the loss of every step.

    A checkpoint is written every ``seconds`` (0: after every step), or less often if writing would take more than a
    twentieth of the time. The random states of torch, Python and NumPy are restored afterwards. Raises TautError if the
    loss is no longer finite, and if Trainer would use another device than the model's.
    """
    device = task.trained[0].device
    arguments = training_arguments(
        folder,
        device.type,
        steps=choices.steps,
        seed=choices.seed,
        per_device_train_batch_size=1,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(choices.warmup * choices.steps),
        dataloader_pin_memory=False,
        report_to="none",
    )
    if (arguments.device.type, arguments.device.index or 0) != (device.type, device.index or 0):
        raise TautError(f"healing: the model is on {device}, but Trainer uses {arguments.device}; move the model")
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
    """Make Adam with a rate for each tensor: ``rate`` times its size in ``trained``.

    Adam's steps do not shrink with the gradient. Codebooks, norms and tables differ in scale by orders of magnitude,
    and steps that suit a table in 2 bits would spoil one in 8.
    """
    groups = [{"params": [tensor], "lr": rate * size} for tensor, size in trained.items()]
    # Gradients of single numbers shrink with width and batch, so the usual 1e-8 would stop large models.
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-15)


class _Steps(Dataset):
    """The numbers of the steps. What a step does depends only on its number."""

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
    """Shows progress, saves by the clock, and ends a run that has diverged."""

    def __init__(self, seconds: float, progress: Progress | None) -> None:
        self.clock, self.progress = SaveClock(seconds), progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)
        if self.clock.due and state.global_step < state.max_steps:
            control.should_save = True
            self.clock.restart()
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.note_writing(time.monotonic() - self.clock.saved_at)
        self.clock.restart()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            check_finite(logs or {}, state.global_step)
        except Diverged as error:
            raise Diverged(f"healing: {error}; lower learning_rate") from None

"""transformers.Trainer for LanguageModelling: the clock, the evaluations, the checkpoints."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from taut.healing.runs import SaveClock, check_finite
from taut.methods.part import Part
from taut.training.objective import LanguageModelling
from taut.training.schedule import rate
from taut.training.spec import TrainSpec
from taut.training.token_rows import Masking, TokenRows, TrainingSet, example

GUIDES, SPENT, CARRIED = "guides.safetensors", "spent.json", "carried-{}-of-{}.safetensors"
"""The files of a checkpoint besides the model and those of Trainer."""
TWICE = 0.5
"""Seconds after which a second ctrl-C counts: torchrun repeats the one that the terminal has sent to all processes."""
FIRST = 0.01
"""The rate of the first step, as a share of the peak, in a warm-up that follows the clock."""


@dataclass
class Spent:
    """What a run has used so far, in all processes together. Every checkpoint has it."""

    seconds: float = 0.0
    guide_flops: float = 0.0
    guide_uses: int = 0
    guide_calls: int = 0
    finished: bool = False

    @classmethod
    def read(cls, checkpoint: Path | None) -> "Spent":
        return cls() if checkpoint is None else cls(**json.loads((checkpoint / SPENT).read_text()))


@dataclass(frozen=True)
class Moment:
    """The progress of a run. ``done`` is the share of the budget; ``evaluation``: the loss is that of held-out text."""

    step: int
    done: float
    loss: float
    tokens_per_second: float
    evaluation: bool = False


Report = Callable[[Moment], None]


def make_optimizer(task: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW. Biases and norms have no weight decay. The other tensors of a part have it, whatever their shape."""
    decayed, others = [], []
    for module in task.modules():
        for name, tensor in module.named_parameters(recurse=False):
            matrix = tensor.dim() > 1 or isinstance(module, Part)
            (decayed if matrix and name != "bias" else others).append(tensor)
    groups = [
        {"params": [tensor for tensor in dict.fromkeys(tensors) if tensor.requires_grad], "weight_decay": decay}
        for tensors, decay in ((decayed, spec.weight_decay), (others, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, spec: TrainSpec, total: int, spent: Spent) -> LambdaLR:
    """The learning rate by the step, or by the clock if the budget is in seconds."""
    shape = (spec.warmup, spec.schedule, spec.floor)
    if spec.budget.seconds is not None:
        limit = spec.budget.seconds
        return LambdaLR(optimizer, lambda step: rate(spent.seconds / limit, FIRST * spec.warmup, *shape))
    return LambdaLR(optimizer, lambda step: rate(step / total, 1 / total, *shape))


class Stop:
    """Whether the run should end: after ctrl-C, or after SIGTERM from a machine that shuts down."""

    def __init__(self) -> None:
        self.asked = False
        self._first_signal_at: float | None = None

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """In this context, the first signal ends the run after its step; a second ctrl-C ends it at once.

        Outside the main thread, where Python receives no signals, nothing changes.
        """

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._first_signal_at is None:
                self.asked, self._first_signal_at = True, now
                say("stopping after this step, with a checkpoint; press ctrl-C once more to stop at once")
            elif number == signal.SIGINT and now - self._first_signal_at >= TWICE:
                raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Watch(TrainerCallback):
    """Counts time, decides when to evaluate, save and stop, and ends a run that has diverged.

    Training time is the time of the steps: forward pass, backward pass, update. All processes decide alike.
    """

    def __init__(
        self, task: LanguageModelling, spec: TrainSpec, spent: Spent, stop: Stop, report: Report | None
    ) -> None:
        self.task, self.spec, self.spent, self.stop, self.report = task, spec, spent, stop, report
        self.clock = SaveClock(spec.save.seconds)
        self._began = self._last = 0.0
        self._done = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.task.begin(state.global_step)
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> TrainerControl:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        due = self.clock.due
        if self.spec.save.steps is not None:
            due = state.global_step % self.spec.save.steps == 0
        self._last, due, asked = agreed(args, time.perf_counter() - self._began, due, self.stop.asked)
        self.spent.seconds += self._last
        self.stop.asked = bool(asked)
        limit = self.spec.budget.seconds
        before = self._done if limit else (state.global_step - 1) / state.max_steps
        self._done = self.spent.seconds / limit if limit else state.global_step / state.max_steps
        self.spent.finished = self._done >= 1.0
        every = self.spec.evaluate.every
        control.should_evaluate = self.spent.finished or _passed(self._done, every) > _passed(before, every)
        control.should_save = bool(due or asked or self.spent.finished)
        control.should_training_stop = bool(asked or self.spent.finished)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        logs = logs or {}
        # A scaled float16 gradient may overflow; the scaler then skips the step.
        names = ("loss",) if self.spec.precision == "float16" else ("loss", "grad_norm")
        check_finite(logs, state.global_step, names)
        loss = logs.get("eval_loss", logs.get("loss"))
        if self.report is not None and loss is not None and state.is_world_process_zero:
            tokens = self.spec.batch * self.spec.length
            speed = tokens / self._last if self._last else 0.0
            self.report(Moment(state.global_step, self._done, loss, speed, "eval_loss" in logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.clock.restart()


class TaskTrainer(Trainer):
    """Evaluates by exact sums over held-out rows. Saves the model with its own tensor names, and the guides apart."""

    def __init__(
        self,
        task: LanguageModelling,
        arguments: TrainingArguments,
        stream: TrainingSet,
        held: TokenRows,
        watch: Watch,
        optimizers: tuple[torch.optim.Optimizer, LambdaLR],
    ) -> None:
        super().__init__(
            task, arguments, data_collator=stack, train_dataset=stream, optimizers=optimizers, callbacks=[watch]
        )
        self.remove_callback(PrinterCallback)
        self.task, self.watch = task, watch
        self.held, self.masking = held, stream.masking

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Compute the loss of the model without guides on all held-out rows."""
        with self.accelerator.autocast():
            metrics = held_out_losses(self.task, self.held, self.masking, self.args)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, guides and ``Spent`` from the main process, and carried memory from every process.

        Raises ``Diverged``, and saves nothing, if a parameter is not finite.
        """
        started = time.monotonic()
        self.task.check_finite()
        if self.task.carried is not None:
            path = self._carried_in(output_dir or self.args.output_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.task.carried.state_dict(), path)
            if self.args.world_size > 1:
                torch.distributed.barrier()
        spent = together(self.args, self.task, self.watch.spent)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.task.model.save_pretrained(folder)
            if self.task.guides is not None:
                save_file(self.task.guides.state_dict(), folder / GUIDES)
            (folder / SPENT).write_text(json.dumps(asdict(spent)))
        self.watch.clock.note_writing(time.monotonic() - started)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load guides and carried memory. The model itself was opened from the checkpoint before.

        If the number of processes has changed, all streams restart.
        """
        if self.task.guides is not None:
            self.task.guides.load_state_dict(load_file(Path(resume_from_checkpoint) / GUIDES))
        if self.task.carried is not None and self._carried_in(resume_from_checkpoint).is_file():
            self.task.carried.load_state_dict(load_file(self._carried_in(resume_from_checkpoint)), self.args.device)

    def _carried_in(self, folder: str) -> Path:
        return Path(folder) / CARRIED.format(self.args.process_index, max(1, self.args.world_size))


@torch.no_grad()
def held_out_losses(
    task: LanguageModelling, rows: TokenRows, masking: Masking | None, args: TrainingArguments
) -> dict[str, float]:
    """``eval_loss`` in nats per target, over the rows of all processes, from float64 sums.

    With a reconstruction also ``eval_reconstruction``: the mean over batches, weighted by their targets.
    """
    training = task.training
    task.eval()
    carried = task.carried.emptied() if task.carried is not None else None
    sums = torch.zeros(3, dtype=torch.float64, device=args.device)
    for indices in _held_batches(rows, args):
        batch = stack([example(rows, index, masking, index) for index in indices])
        if carried is not None:
            carried.begin()
            batch["restart"] = torch.tensor([not rows.follows(index) for index in indices])
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        targets = (batch["labels"] >= 0).sum()
        with task.reconstructing() as errors:
            sums[0] += task.total(**batch, carried=carried).double()
        sums[1] += targets
        sums[2] += sum(errors) * targets
    task.train(training)
    if args.world_size > 1:
        torch.distributed.all_reduce(sums)
    total, count, missed = sums.tolist()
    metrics = {"eval_loss": total / count}
    return metrics if task.reconstruction is None else metrics | {"eval_reconstruction": missed / count}


def _held_batches(rows: TokenRows, args: TrainingArguments) -> list[list[int]]:
    """This process's share of the rows, in batches. With streams, a batch holds the next row of each of its streams."""
    size, world = args.per_device_train_batch_size, max(1, args.world_size)
    if rows.streams:
        streams = range(args.process_index, rows.streams, world)
        groups = [streams[start : start + size] for start in range(0, len(streams), size)]
        return [[stream * rows.steps + step for stream in group] for group in groups for step in range(rows.steps)]
    indices = range(args.process_index, len(rows), world)
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def agreed(args: TrainingArguments, seconds: float, *flags: bool) -> tuple[float, ...]:
    """The longest time and the union of the flags, over all processes."""
    if args.world_size <= 1:
        return seconds, *flags
    values = torch.tensor([seconds, *map(float, flags)], dtype=torch.float64, device=args.device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return tuple(values.tolist())


def together(args: TrainingArguments, task: LanguageModelling, spent: Spent) -> Spent:
    """Add to ``spent`` what the guides of all processes have used since the last call, and return it."""
    guides = task.guides
    if guides is None:
        return spent
    used = torch.tensor([guides.flops, guides.uses, guides.calls], dtype=torch.float64, device=args.device)
    guides.flops, guides.uses, guides.calls = 0.0, 0, 0
    if args.world_size > 1:
        torch.distributed.all_reduce(used)
    flops, uses, calls = used.tolist()
    spent.guide_flops += flops
    spent.guide_uses += int(uses)
    spent.guide_calls += int(calls)
    return spent


def stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _passed(done: float, every: float) -> int:
    """How many evaluations are due by now. Rounded, because 3 x 0.1 is not exactly 0.3."""
    return math.floor(round(done / every, 9))

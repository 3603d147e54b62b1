"""A whole training run: from a spec to a folder with a model, its tokenizer and the record."""

import json
import logging
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from taut.core.errors import TautError
from taut.core.table import clip
from taut.healing.runs import Diverged, newest, random_states_kept, training_arguments
from taut.surgery.apply import copy_companions
from taut.surgery.folders import check_writable, whole_folder
from taut.surgery.loading import check_device
from taut.training.budget import Costs, costs_of, plan_course
from taut.training.carried_memory import CarriedMemory
from taut.training.checkpoints import check, claim, explain_full_disk, history
from taut.training.corpus import Corpus, read_corpus
from taut.training.guide import Guides, guided_parts
from taut.training.objective import LanguageModelling
from taut.training.reconstruction import Reconstruction
from taut.training.record import RECORD, Status, general_facts, guide_facts, loss_facts, spent_facts
from taut.training.schedule import Course, guide_weight
from taut.training.spec import TrainSpec
from taut.training.start import begin, resolve_objective, resumed
from taut.training.token_rows import Masking, TokenRows, TrainingSet, spread, token_rows
from taut.training.tokenizer import make_tokenizer
from taut.training.trainer import Report, Spent, Stop, TaskTrainer, Watch, make_optimizer, make_schedule

log = logging.getLogger("taut")

TOKENIZER, LOGS = "tokenizer", "runs"
"""In the state folder: a tokenizer that was made for the run, and the logs for TensorBoard."""


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    ``folder`` holds the model if ``status`` is done, else the state from which the next run continues. ``main`` is
    True only in the first process.
    """

    status: Status
    folder: Path
    record: dict[str, Any]
    main: bool = True

    def __repr__(self) -> str:
        return clip(f"Trained({self.status}: {self.sentence()})")

    @property
    def exit_code(self) -> int:
        """130 after ctrl-C, 1 if the run failed, else 0."""
        return {"done": 0, "interrupted": 130, "failed": 1}[self.status]

    def sentence(self) -> str:
        """One line for the end of the run."""
        spent, evaluations = self.record["spent"], self.record["evaluations"]
        loss = f", loss {evaluations[-1]['loss']:.4f} on held-out text" if evaluations else ""
        amounts = f"{spent['steps']:,} steps, {spent['tokens']:,} tokens, {spent['seconds']:.0f} s{loss}"
        if self.status == "done":
            return f"{self.folder}: {amounts}"
        if self.status == "interrupted":
            return f"interrupted after {amounts}; the same command goes on from {self.folder}"
        return f"failed: {self.record['reason']}; the last good checkpoint, if there was one, is kept in {self.folder}"


def train(
    spec: "str | Path | dict[str, Any] | TrainSpec",
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    progress: Report | None = None,
) -> Trained:
    """Run a spec, or the rest of an interrupted run, and write the folder ``out`` (default: ``runs/NAME`` of a file).

    Until the end everything is kept beside it, in ``OUT.state``. After ctrl-C, a kill or a full disk, the same call
    continues from there. On a CPU it reaches the bits of an uninterrupted run. If the run is already done, it returns
    the record in the folder. Raises TautError for wrong input, and if the folder or state belongs to another spec.
    """
    chosen = TrainSpec.load(spec)
    if out is None:
        if not isinstance(spec, str | Path):
            raise TautError("train: give out=, the folder to write")
        out = Path("runs") / Path(spec).stem
    target = Path(out).absolute()
    state = target.with_name(f"{target.name}.state")
    if (target / RECORD).is_file():
        return _finished(target, state, chosen)
    check_writable(target)
    with random_states_kept():
        return _Run(chosen, target, state, device, progress).go()


def _finished(target: Path, state: Path, spec: TrainSpec) -> Trained:
    record = json.loads((target / RECORD).read_text())
    change = spec.change(record["spec"])
    if change is not None:
        raise TautError(f"{target}: holds the result of another spec: {change}; choose another --out")
    # The state is still there if the run was killed just before removing it.
    shutil.rmtree(state, ignore_errors=True)
    return Trained("done", target, record)


class _Run:
    """One run of a spec in one process, perhaps of several, with everything that it needs."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    stream: TrainingSet
    held: TokenRows
    model: PreTrainedModel
    guides: Guides | None
    carried: CarriedMemory | None
    costs: Costs
    course: Course

    def __init__(self, spec: TrainSpec, target: Path, state: Path, device: str, progress: Report | None) -> None:
        self.spec, self.target, self.state = spec, target, state
        self.source, self.masked = resolve_objective(spec)
        self.arguments = _arguments(spec, self.state, device)
        self.rank = self.arguments.process_index
        self.progress = progress if self.rank == 0 else None
        self._read()
        self.last = newest(self.state)
        self.spent = Spent.read(self.last)
        self._build()

    def go(self) -> Trained:
        status, reason, logged = "done", None, history(self.last)
        task = LanguageModelling(
            self.model,
            self.guides,
            self._guide_weight,
            self.spec.seed,
            self.rank,
            self.carried,
            Reconstruction.of(self.model, self.spec.reconstruction) if self.spec.reconstruction else None,
        )
        if not self.spent.finished:
            stop = Stop()
            trainer = self._trainer(task, Watch(task, self.spec, self.spent, stop, self.progress))
            try:
                with stop.listening(self._say), explain_full_disk(self.state):
                    trainer.train(resume_from_checkpoint=None if self.last is None else str(self.last))
            except Diverged as error:
                status, reason = "failed", f"{error}; lower learning_rate"
            logged = trainer.state.log_history
            if status == "done" and not self.spent.finished:
                status = "interrupted"
        record = {"status": status, "reason": reason, **self._facts(logged)}
        if self.rank == 0:
            with explain_full_disk(self.state):
                self._write(status, record)
        if self.arguments.world_size > 1:
            # All processes wait until the first one has written.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return Trained(status, self.target if status == "done" else self.state, record, self.rank == 0)

    def _read(self) -> None:
        """Get text, tokenizer and rows. The first process makes the files that the others read."""
        spec = self.spec
        self.corpus = read_corpus(spec)
        with self.arguments.main_process_first(local=False):
            (claim if self.rank == 0 else check)(self.state, spec, self.corpus.sha256)
            cache = self.state / TOKENIZER
            self.tokenizer = make_tokenizer(spec.tokenizer, self.source, self.corpus.learned, self.masked, cache)
        self.masking = self._masking()
        self.rows = token_rows(self.corpus.learned, self.tokenizer, spec, self.masked)
        held_out = token_rows(self.corpus.held, self.tokenizer, spec, self.masked)
        for rows, what, least in ((self.rows, "train on", spec.batch), (held_out, "evaluate on", 1)):
            if len(rows) < least:
                raise TautError(
                    f"text {', '.join(spec.text)}: {len(rows)} rows of {spec.length} tokens to {what}, but at least "
                    f"{least} are needed; give more text or a smaller length"
                )
        self.held = spread(held_out, spec.evaluate.tokens)

    def _masking(self) -> Masking | None:
        if not self.masked:
            return None
        if self.tokenizer.mask_token_id is None:
            raise TautError("masked training: the tokenizer has no mask token")
        return Masking(self.spec.masked, self.tokenizer.mask_token_id, len(self.tokenizer))

    def _build(self) -> None:
        """Make the model and its guides, and plan the steps that the budget allows."""
        spec = self.spec
        if self.last is None:
            self.model = begin(spec, self.source, self.tokenizer, self.corpus.learned)
        else:
            self.model = resumed(self.last)
        self.guides = None
        if spec.guide is not None:
            parts = guided_parts(self.model, spec.guide.slots)
            self.guides = Guides(parts, spec.guide.stochastic, spec.seed, self.rank)
        self.carried = CarriedMemory.of(self.model) if spec.carry_memory else None
        keys = spec.length if self.carried is None else self.carried.keys(spec.length)
        self.costs = costs_of(self.model, keys, self.guides)
        self.course = plan_course(spec, self.costs)
        positions = self.course.total * spec.batch
        self.stream = TrainingSet(self.rows, positions, spec.batch, spec.seed, self.masking, self.course.batch_of)

    def _guide_weight(self, step: int) -> float:
        guide = self.spec.guide
        return 0.0 if guide is None else guide_weight(step, self.course.guided, guide.schedule)

    def _trainer(self, task: LanguageModelling, watch: Watch) -> TaskTrainer:
        self.arguments.max_steps = self.course.total
        optimizer = make_optimizer(task, self.spec)
        schedule = make_schedule(optimizer, self.spec, self.course.total, self.spent)
        return TaskTrainer(task, self.arguments, self.stream, self.held, watch, (optimizer, schedule))

    def _facts(self, logged: list[dict[str, Any]]) -> dict[str, Any]:
        spec, losses = self.spec, loss_facts(logged)
        text = {"sha256": self.corpus.sha256, "tokens": self.rows.tokens, "held_out_tokens": self.held.tokens}
        return {
            **general_facts(spec, self.model, self.costs, self.course),
            "objective": "masked" if self.masked else "causal",
            "processes": self.arguments.world_size,
            "device": str(self.arguments.device),
            "text": text,
            "spent": spent_facts(spec, self.costs, self.stream, self.spent, len(losses["losses"])),
            "guide": guide_facts(spec, self.costs, self.course, self.guides, self.spent),
            **losses,
        }

    def _write(self, status: Status, record: dict[str, Any]) -> None:
        """Write the result; or, if the run is not done, only the record, beside the checkpoints."""
        text = json.dumps(record, indent=1) + "\n"
        if status != "done":
            (self.state / RECORD).write_text(text)
            return
        with whole_folder(self.target) as folder:
            if self.source.folder is not None:
                copy_companions(self.source.folder, folder)
            # Weights are float32 during training. They are saved in the dtype of the source.
            self.model.to(self.source.dtype).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            (folder / RECORD).write_text(text)
            if (self.state / LOGS).is_dir():
                shutil.copytree(self.state / LOGS, folder / LOGS)
        shutil.rmtree(self.state)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            log.warning(text)


def _arguments(spec: TrainSpec, state: Path, device: str) -> TrainingArguments:
    """The arguments of Trainer.

    Raises TautError for a missing device or reporter, for float16 on a CPU, and for a batch that cannot be divided.
    """
    kind = check_device(device, ("cpu", "cuda")).type
    if spec.precision == "float16" and kind == "cpu":
        raise TautError("precision = 'float16': needs a GPU; use float32 or bfloat16 on a CPU")
    if spec.report_to != "none" and find_spec(spec.report_to) is None:
        raise TautError(f"report_to = {spec.report_to!r}: not installed: pip install {spec.report_to}")
    arguments = training_arguments(
        state,
        kind,
        steps=1,
        seed=spec.seed,
        gradient_accumulation_steps=spec.accumulate,
        max_grad_norm=spec.clip,
        bf16=spec.precision == "bfloat16",
        fp16=spec.precision == "float16",
        dataloader_pin_memory=kind == "cuda",
        report_to=spec.report_to,
        run_name=state.stem,
    )
    pieces = spec.accumulate * max(1, arguments.world_size)
    if spec.batch % pieces:
        raise TautError(
            f"batch = {spec.batch} is not a multiple of {pieces}: {spec.accumulate} pieces in each of "
            f"{arguments.world_size} processes"
        )
    arguments.per_device_train_batch_size = spec.batch // pieces
    return arguments

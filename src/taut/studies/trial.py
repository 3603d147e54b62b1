"""One trial, prepared once: open the skeleton, plan, compress, score, save, measure."""

import time
from datetime import UTC, datetime

import torch
from transformers import PreTrainedModel

from taut.core.environment import environment
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.record import Quantity, Record, Score
from taut.core.spec import TrialSpec
from taut.data import calibration_texts
from taut.evaluation.task import parse_task
from taut.healing.heal import compress_and_heal
from taut.measurement.energy import energy
from taut.measurement.kernels import kernel_path
from taut.measurement.speed import forward_case
from taut.studies.costs import Report, footprint_of, latencies, peak, sample_inputs, saved, sizes
from taut.surgery.loading import open_model, open_skeleton, open_tokenizer, resolve
from taut.surgery.prepare import Prepared, prepare

GENEROUS_BASE = 1.5e9
"""Bytes of the process with its libraries but without a model, generously estimated."""


class Trial:
    """A trial that is ready to run: its model's skeleton is open, its plan is made, its tasks are checked.

    ``reason`` says why it cannot work (the recipe fits no site), or is None. Raises TautError for input that is wrong
    with any recipe (no such model, a wrong option of a task).
    """

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec
        self.source = resolve(spec.model)
        self.tasks = [parse_task(task) for task in spec.tasks]
        self.dtype = getattr(torch, spec.dtype)
        skeleton = open_skeleton(self.source, self.dtype)
        self.parameters = sum(tensor.numel() for tensor in skeleton.parameters())
        self.prepared: Prepared | None = None
        self.reason: str | None = None
        if spec.recipe:
            recipe = Recipe.parse(spec.recipe, spec.recipe_name)
            try:
                self.prepared = prepare(self.source, recipe, dtype=self.dtype, skeleton=skeleton)
            except TautError as error:
                self.reason = str(error)

    def estimate(self) -> dict[str, float]:
        """Rough ``seconds`` and ``bytes`` of memory: the weights a few times over, and a pass over the tasks' data."""
        measure = self.spec.measure
        per_parameter = 2e-7 * (1 + len(self.tasks)) + (1e-7 if measure.get("latency") else 0)
        seconds = 4 + self.parameters * per_parameter + (12 if measure.get("memory") else 0)
        return {"seconds": seconds, "bytes": GENEROUS_BASE + 4 * 4.0 * self.parameters}

    def run(self, report: Report) -> Record:
        """Run the whole trial. ``report`` is called with a few words at the start of each step."""
        started, clock = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
        options = self.spec.measure
        torch.manual_seed(self.spec.seed)
        report("opening and compressing")
        model = self._model()
        how = "open, calibrate, fit, heal"
        costs = {"compress_seconds": Quantity(value=time.monotonic() - clock, unit="s", how=how)}
        scores = self._scores(model, report)
        report("counting")
        plan = self.prepared.plan if self.prepared else None
        footprint = footprint_of(model, plan.sites if plan else None)
        latency = options.get("latency") or {}
        with saved(model) as folder:
            costs |= sizes(model, footprint, folder, latency.get("length", 128))
            if options.get("memory"):
                report("peak memory, in a fresh process")
                costs["peak_bytes"] = peak(folder, self.spec.device, latency)
        if latency:
            report("latency")
            costs |= latencies(model, self._original() if self.prepared else model, latency)
        if options.get("energy"):
            inputs = sample_inputs(model, 1, 128)
            costs["energy_joules"] = energy(forward_case(model, inputs), device=self.spec.device)
        threads = latency.get("threads") or torch.get_num_threads()
        return self.spec.record(
            "done",
            scores=tuple(scores),
            costs=costs,
            bytes_per_slot={slot: share.stored for slot, share in footprint.slots.items()},
            plan=tuple(step.to_dict() for step in plan.steps) if plan else (),
            untouched=plan.untouched if plan else (),
            environment=environment(threads) | {"kernels": kernel_path(self.spec.device)},
            started=started,
            seconds=time.monotonic() - clock,
        )

    def _model(self) -> PreTrainedModel:
        if self.prepared is None:
            return self._original()
        spec = self.spec
        texts = calibration_texts(spec.text, [task.evaluated() for task in self.tasks])
        return compress_and_heal(self.prepared, texts, spec.heal, text=spec.text, device=spec.device, seed=spec.seed)

    def _original(self) -> PreTrainedModel:
        return open_model(self.source, self.dtype, self.spec.device, self.spec.seed)

    def _scores(self, model: PreTrainedModel, report: Report) -> list[Score]:
        scores: list[Score] = []
        if not self.tasks:
            return scores
        tokenizer = open_tokenizer(self.source)
        if tokenizer is None:
            raise TautError(f"{self.source.name}: no tokenizer there, and a task needs one")
        for task in self.tasks:
            report(f"task {task.id}")
            reference = self._original() if task.needs_reference else None
            scores += task.evaluate(model, tokenizer, seed=self.spec.seed, reference=reference)
        return scores

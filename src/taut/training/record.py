"""The content of ``training.json``, the record of a run."""

from typing import Any, Literal

import torch
from torch import nn

from taut.core.environment import environment
from taut.training.budget import ENDLESS, Costs, guided_share, use_of
from taut.training.guide import Guides
from taut.training.schedule import Course
from taut.training.spec import TrainSpec
from taut.training.token_rows import TrainingSet
from taut.training.trainer import Spent

RECORD = "training.json"
Status = Literal["done", "interrupted", "failed"]


def spent_facts(spec: TrainSpec, costs: Costs, stream: TrainingSet, spent: Spent, steps: int) -> dict[str, Any]:
    """What the run used, in all four units of a budget. Padding counts in FLOPs, but not in tokens."""
    positions = steps * spec.batch * spec.length
    flops = positions * costs.model + spent.guide_flops
    return {"steps": steps, "tokens": stream.tokens(steps), "flops": flops, "seconds": spent.seconds}


def guide_facts(
    spec: TrainSpec, costs: Costs, course: Course, guides: Guides | None, spent: Spent
) -> dict[str, Any] | None:
    """The planned and the actual use of guides. ``uses`` of ``calls`` computed a guide. None without guides."""
    if guides is None:
        return None
    return {
        "share": guided_share(spec, costs),
        "steps": course.guided,
        "flops_expected": course.guided * spec.batch * spec.length * costs.guides * use_of(spec),
        "flops_used": spent.guide_flops,
        "uses": spent.guide_uses,
        "calls": spent.guide_calls,
        "maps": list(guides.names),
    }


def loss_facts(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The losses that Trainer logged, of every step and on held-out text, in nats per target.

    With a reconstruction, the evaluations on held-out text include its loss.
    """
    names = {"step": "step", "eval_loss": "loss", "eval_reconstruction": "reconstruction"}
    logs = [entry for entry in history if "eval_loss" in entry]
    evaluations = [{names[key]: value for key, value in entry.items() if key in names} for entry in logs]
    return {"losses": [entry["loss"] for entry in history if "loss" in entry], "evaluations": evaluations}


def general_facts(spec: TrainSpec, model: nn.Module, costs: Costs, course: Course) -> dict[str, Any]:
    return {
        "version": 1,
        "spec": spec.to_dict(),
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "planned_steps": None if course.total == ENDLESS else course.total,
        "flops_per_token": {"model": costs.model, "dense": costs.dense, "guides": costs.guides},
        "environment": environment(torch.get_num_threads()),
    }

"""The cost of a training step, and the number of steps that a budget allows."""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from taut.architectures.locate import locate
from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.surgery.apply import is_compressed, steps_of, untouched
from taut.training.flops import TRAINING, USE, matched_share
from taut.training.guide import Guides
from taut.training.schedule import Course, course
from taut.training.spec import TrainSpec

FIXED_SHARE = 0.5
"""The default share of guided steps: the published choice for a fixed number of steps."""
ENDLESS = 1 << 31
"""The number of steps of a run that ends by the clock."""


@dataclass(frozen=True)
class Costs:
    """Training FLOPs of one token: of the model, of the same model not compressed, and of all guides if computed."""

    model: float
    dense: float
    guides: float = 0.0


def costs_of(model: PreTrainedModel, length: int, guides: Guides | None = None) -> Costs:
    """Compute the costs from shapes, for rows of ``length`` tokens; see ``taut.training.flops``.

    Every linear map, the head over the vocabulary and all score pairs of attention count, masked or not. Norms, biases
    and lookups do not.
    """
    plain = untouched(model)
    methods = {step.site.name: step.method for step in steps_of(model)} if is_compressed(model) else {}
    sites = locate(plain, length).sites
    dense = sum(site.dense().flops_per_token for site in sites)
    compressed = sum((methods[s.name].predict(s) if s.name in methods else s.dense()).flops_per_token for s in sites)
    placed = {site.path for site in sites if isinstance(site, LinearSite)}
    placed |= {head for site in sites if isinstance(site, TableSite) for head in site.heads}
    # Untied heads, the map before the head of a masked model, routers.
    rest = sum(
        2.0 * module.weight.numel()
        for path, module in plain.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path not in placed
    )
    guide = sum(2.0 * weight.numel() for weight in guides.maps) if guides is not None else 0.0
    return Costs(TRAINING * (compressed + rest), TRAINING * (dense + rest), TRAINING * guide)


def use_of(spec: TrainSpec) -> float:
    """The expected share of its phase in which a guide is computed."""
    return USE if spec.guide is not None and spec.guide.stochastic else 1.0


def guided_share(spec: TrainSpec, costs: Costs) -> float:
    """rho, the share of guided steps: from the spec, else from its mode. 0 without a guide."""
    if spec.guide is None:
        return 0.0
    if spec.guide.share is not None:
        return spec.guide.share
    if spec.guide.mode == "fixed_steps":
        return FIXED_SHARE
    return matched_share(costs.dense, costs.model, costs.guides, use_of(spec))


def plan_course(spec: TrainSpec, costs: Costs) -> Course:
    """Plan the steps that the budget allows, rounded down.

    A budget in steps or tokens does not count repeated batches, as published; one in FLOPs counts everything. Raises
    TautError for a budget below one step, and for a guide that does not fit (see ``schedule.course``).
    """
    tokens, share = spec.batch * spec.length, guided_share(spec, costs)
    mode = spec.guide.mode if spec.guide is not None else "fixed_steps"
    budget = spec.budget
    if budget.seconds is not None:
        return Course(ENDLESS)
    if budget.steps is not None:
        return course(budget.steps, share, mode)
    if budget.tokens is not None:
        fresh, unit = budget.tokens // tokens, f"{tokens:,} tokens"
    else:
        repeated = share if mode == "matched_flops" else 0.0
        step = tokens * (costs.model * (1.0 + repeated) + costs.guides * share * use_of(spec))
        fresh, unit = math.floor(budget.flops / step), f"{step:.3g} FLOPs"
    if fresh < 1:
        raise TautError(f"budget: {budget.tokens or budget.flops:,} is less than one step, which takes {unit}")
    return course(fresh, share, mode)

"""What a step costs, and how many steps a budget buys."""

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
"""Of the steps, guided where nothing is said: the published choice for a fixed number of steps."""
ENDLESS = 1 << 31
"""Steps of a run that the clock ends."""


@dataclass(frozen=True)
class Costs:
    """Training FLOPs of one token: of the model as it is, of the same model untouched, and of all guides computed."""

    model: float
    dense: float
    guides: float = 0.0


def costs_of(model: PreTrainedModel, length: int, guides: Guides | None = None) -> Costs:
    """From shapes, for rows of ``length`` tokens. Counted are every linear map, the head over the vocabulary and all
    score pairs of attention, masked or not, as ``flops`` says; norms, biases and lookups are not."""
    plain = untouched(model)
    methods = {step.site.name: step.method for step in steps_of(model)} if is_compressed(model) else {}
    sites = locate(plain, length).sites
    dense = sum(site.dense().flops_per_token for site in sites)
    ours = sum((methods[s.name].predict(s) if s.name in methods else s.dense()).flops_per_token for s in sites)
    placed = {site.path for site in sites if isinstance(site, LinearSite)}
    placed |= {head for site in sites if isinstance(site, TableSite) for head in site.heads}
    # Heads of their own, the map before a masked model's head, routers.
    rest = sum(
        2.0 * module.weight.numel()
        for path, module in plain.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path not in placed
    )
    beside = sum(2.0 * guide.numel() for guide in guides.maps) if guides is not None else 0.0
    return Costs(TRAINING * (ours + rest), TRAINING * (dense + rest), TRAINING * beside)


def use_of(spec: TrainSpec) -> float:
    """How often a guide is computed over its phase, expected."""
    return USE if spec.guide is not None and spec.guide.stochastic else 1.0


def guided_share(spec: TrainSpec, costs: Costs) -> float:
    """rho: what the spec says, else what its mode asks for. 0 without a guide."""
    if spec.guide is None:
        return 0.0
    if spec.guide.share is not None:
        return spec.guide.share
    if spec.guide.mode == "fixed_steps":
        return FIXED_SHARE
    return matched_share(costs.dense, costs.model, costs.guides, use_of(spec))


def plan_course(spec: TrainSpec, costs: Costs) -> Course:
    """The steps that the budget buys, rounded down. Steps and tokens count what is read afresh, as published; FLOPs
    count everything. Raises TautError for a budget below one step, and for a guide that does not fit in."""
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

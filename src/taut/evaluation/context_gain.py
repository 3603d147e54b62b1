"""Relative effective context length: how much context each model of a group turns into a lower loss.

Source: Dai et al. 2019, Transformer-XL (arXiv 1901.02860), appendix C. Changed: we add an interval, found by resampling
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from taut.core.errors import TautError

DRAWS = 200
"""How often the positions are resampled for an interval."""


@dataclass(frozen=True)
class EffectiveContext:
    """The effective context of one model.

    ``tokens``: the context length beyond which one more step gains less than the threshold. ``at_least``: even the
    last step to the longest context reached the threshold, so the true value may be greater. ``low``, ``high``: the
    95 % interval from positions resampled with replacement. ``gains``: this model's gain at every step, from the
    shortest context to the longest.
    """

    tokens: int
    at_least: bool
    low: int
    high: int
    gains: tuple[float, ...]


def effective_contexts(
    losses: Tensor, contexts: Sequence[int], hardest: float = 0.1, threshold: float = 0.01, seed: int = 0
) -> list[EffectiveContext]:
    """The effective context of each of M models, relative to this group of models.

    ``losses``: (M, C, T) nats at the same T positions of a text, for each model and each of C context lengths.
    ``contexts``: the C lengths in tokens, evenly spaced. Starting at the shortest, the context grows by one step as
    long as the step's gain (see ``relative_gains``) is at least ``threshold``. Raises TautError for a shape or number
    out of range.
    """
    steps = {after - before for before, after in pairwise(contexts)}
    if len(steps) != 1 or min(steps) < 1:
        raise TautError(f"contexts = {list(contexts)}: expected two or more lengths, evenly spaced and rising")
    if losses.dim() != 3 or losses.shape[1] != len(contexts) or not losses.numel():
        raise TautError(f"losses of shape {tuple(losses.shape)}: expected (models, {len(contexts)}, positions)")
    if not 0 < hardest <= 1:
        raise TautError(f"hardest = {hardest}: expected a share above 0 and at most 1")
    if not threshold > 0:
        raise TautError(f"threshold = {threshold}: expected a number above 0")
    gains = relative_gains(losses, hardest)
    generator = torch.Generator().manual_seed(seed)
    count = losses.shape[2]
    drawn = []
    for _ in range(DRAWS):
        places = torch.randint(count, (count,), generator=generator).to(losses.device)
        drawn.append(_reached(relative_gains(losses[:, :, places], hardest), threshold))
    ends = torch.stack(drawn).double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).round().long()
    effective = []
    for model, reached in enumerate(_reached(gains, threshold).tolist()):
        low, high = (contexts[place] for place in ends[:, model].tolist())
        last = reached == len(contexts) - 1
        effective.append(EffectiveContext(contexts[reached], last, low, high, tuple(gains[model].tolist())))
    return effective


def relative_gains(losses: Tensor, hardest: float) -> Tensor:
    """The share by which each step of context lowers a model's perplexity, relative to the group.

    (M, C, T) nats -> (M, C - 1) float64 on the CPU. The baseline of a position is the lowest loss of any model at the
    shorter context. Only the share ``hardest`` of positions with the highest baseline counts. A loss above the
    baseline counts as the baseline. So every model has to improve on the same numbers, and on tokens that a short
    context does not predict.
    """
    losses = losses.double().cpu()
    chosen = max(1, ceil(round(hardest * losses.shape[2], 6)))
    gains = []
    for before, after in pairwise(losses.unbind(1)):
        baseline = before.amin(0)
        # A stable sort takes the earlier of two equal positions, on any machine.
        places = baseline.argsort(descending=True, stable=True)[:chosen]
        lowered = torch.minimum(baseline, after)[:, places].mean(1)
        # 1 - exp(lowered) / exp(baseline), without rounding two large numbers.
        gains.append(-torch.expm1(lowered - baseline[places].mean()))
    return torch.stack(gains, 1)


def _reached(gains: Tensor, threshold: float) -> Tensor:
    """(M, C - 1) gains -> (M,): the number of steps before the first one that gains too little."""
    return (gains >= threshold).long().cumprod(1).sum(1)

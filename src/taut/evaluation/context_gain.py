"""Relative effective context length: how much context each model of a group turns into a lower loss.

Source: Dai et al. 2019, Transformer-XL (arXiv 1901.02860), appendix C. Changed: an interval, by redrawing positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from taut.core.errors import TautError

DRAWS = 200
"""How often positions are drawn again for an interval."""


@dataclass(frozen=True)
class EffectiveContext:
    """``tokens`` of context, of which one step more no longer gains what it must. ``at_least``: the longest context
    measured still gained it, so the true value may be greater. ``low``, ``high``: 95 % of those that positions drawn
    again, with replacement, give. ``gains``: by every step from the shortest context to the longest, for this model.
    """

    tokens: int
    at_least: bool
    low: int
    high: int
    gains: tuple[float, ...]


def effective_contexts(
    losses: Tensor, contexts: Sequence[int], hardest: float = 0.1, threshold: float = 0.01, seed: int = 0
) -> list[EffectiveContext]:
    """The effective context of each of M models, relative to the group that they are.

    ``losses``: (M, C, T) nats of the same T positions of a text, for each model and each of C contexts; ``contexts``:
    their C lengths in tokens, evenly spaced. From the shortest on, a context goes up by a step as long as the step's
    gain (see ``relative_gains``) is at least ``threshold``. Raises TautError for a shape or number out of range.
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
    found = []
    for model, reached in enumerate(_reached(gains, threshold).tolist()):
        low, high = (contexts[place] for place in ends[:, model].tolist())
        last = reached == len(contexts) - 1
        found.append(EffectiveContext(contexts[reached], last, low, high, tuple(gains[model].tolist())))
    return found


def relative_gains(losses: Tensor, hardest: float) -> Tensor:
    """(M, C, T) nats -> (M, C - 1) float64 on the CPU: the share by which each step of context lowers a model's
    perplexity, relative to the group.

    The baseline of a position is the least loss of any model at the shorter context. The share ``hardest`` of positions
    with the greatest baseline counts, and of these only losses below the baseline: so every model has to improve on
    the same numbers, and on tokens that little context does not tell.
    """
    losses = losses.double().cpu()
    chosen = max(1, ceil(round(hardest * losses.shape[2], 6)))
    gains = []
    for before, after in pairwise(losses.unbind(1)):
        baseline = before.amin(0)
        # Of equals the earlier position, on any machine.
        places = baseline.argsort(descending=True, stable=True)[:chosen]
        lowered = torch.minimum(baseline, after)[:, places].mean(1)
        # 1 - exp(lowered) / exp(baseline), without the rounding of two great numbers.
        gains.append(-torch.expm1(lowered - baseline[places].mean()))
    return torch.stack(gains, 1)


def _reached(gains: Tensor, threshold: float) -> Tensor:
    """(M, C - 1) gains -> (M,) the number of steps before the first that gains too little."""
    return (gains >= threshold).long().cumprod(1).sum(1)

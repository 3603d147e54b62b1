"""A learned choice among ordered classes, each one step above the class before.

The value of every step is learned, and the score of a class is the sum of the steps up to it. So a row that loses a
class falls to the class below, not to the first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 4.0
"""Initial value of each step up to a row's class, and minus that of each step above. A row with a class on either side
of its own then samples its own class with a probability of 0.96."""


def initial_values(classes: Tensor, count: int) -> Tensor:
    """Step values that give every row its class: (V,) classes out of ``count`` C -> (V, C - 1) float32."""
    taken = torch.arange(count - 1, device=classes.device) < classes[:, None]
    return torch.where(taken, MARGIN, -MARGIN)


def class_scores(values: Tensor) -> Tensor:
    """The scores of classes: (..., C - 1) step values -> (..., C). The first score is zero."""
    return F.pad(values.cumsum(-1), (1, 0))


def with_noise(scores: Tensor, seed: int) -> Tensor:
    """Add Gumbel noise to (..., C) scores, so that the greatest is a sample from the softmax.

    The same ``seed`` gives the same noise. Source: Jang et al. 2016, Categorical Reparameterization with
    Gumbel-Softmax (arXiv 1611.01144).
    """
    generator = torch.Generator().manual_seed(seed)
    return scores - torch.empty(scores.shape).exponential_(generator=generator).log().to(scores)


def gate(scores: Tensor, chosen: Tensor) -> Tensor:
    """One for the chosen class, else zero: (..., C) scores and (...) classes -> (..., C).

    The gradient is that of the softmax (straight through).
    """
    soft = scores.softmax(-1)
    return F.one_hot(chosen, scores.shape[-1]) + soft - soft.detach()

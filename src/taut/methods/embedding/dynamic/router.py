"""A learned choice of one class out of several that lie in a row, each a step beyond the one before.

What is learned is the value of every step; the score of a class is the sum of the steps that lead to it. So a row that
gives up a class falls to the one below, not to the first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 4.0
"""What a step is worth at the start: for every step that a row has taken, against every one that it has not. A row with
a class on either side of its own then draws its own with a chance of .96."""


def initial_values(classes: Tensor, count: int) -> Tensor:
    """(V,) classes out of ``count`` C -> (V, C - 1) float32 values of steps, under which every row has its class."""
    taken = torch.arange(count - 1, device=classes.device) < classes[:, None]
    return torch.where(taken, MARGIN, -MARGIN)


def class_scores(values: Tensor) -> Tensor:
    """(..., C - 1) values of steps -> (..., C) scores of classes, the first zero."""
    return F.pad(values.cumsum(-1), (1, 0))


def with_noise(scores: Tensor, seed: int) -> Tensor:
    """(..., C) plus Gumbel noise, so that the greatest is a draw from the softmax; the same for the same ``seed``.
    Source: Jang et al. 2016, Categorical Reparameterization with Gumbel-Softmax (arXiv 1611.01144)."""
    generator = torch.Generator().manual_seed(seed)
    return scores - torch.empty(scores.shape).exponential_(generator=generator).log().to(scores)


def gate(scores: Tensor, chosen: Tensor) -> Tensor:
    """(..., C) scores and (...) classes -> (..., C): one for the chosen class, else zero; the gradient is that of the
    softmax (straight through)."""
    soft = scores.softmax(-1)
    return F.one_hot(chosen, scores.shape[-1]) + soft - soft.detach()

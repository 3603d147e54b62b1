"""How far a student's answers are from its teacher's. All losses are means in nats or in shares of a variance, so they
do not depend on widths, lengths or batch sizes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, D), (N, D) float -> scalar: the mean squared difference over the teacher's variance around its mean vector.

    0 is a perfect copy; 1 is what the constant mean vector would get.
    """
    spread = teacher.var(0, unbiased=False).mean()
    return (student - teacher).square().mean() / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, C), (N, C) logits -> scalar: the mean Kullback-Leibler divergence of the student's from the teacher's
    distribution over C classes, nats."""
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)


def answers(output: Any, real: Tensor, target: str) -> dict[str, Tensor]:
    """What of a model's output is imitated: ``hidden``, the last states of the real tokens, (N, D) float32, and for
    the target ``logits`` also ``logits``, (N, V) of the same tokens or (B, C) of a classifier.

    ``real`` (B, T) bool marks the real tokens of what the output is about: the decoder's where there is one.
    """
    states = output.get("decoder_hidden_states") or output.get("hidden_states")
    last = output["last_hidden_state"] if "last_hidden_state" in output else states[-1]
    found = {"hidden": last[real].float()}
    if target == "logits":
        logits = output["logits"]
        found["logits"] = (logits[real] if logits.shape[:2] == real.shape else logits).float()
    return found


def imitation(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """The loss of one batch: the relative error of the hidden states plus, where there are logits, their divergence."""
    loss = relative_error(student["hidden"], teacher["hidden"])
    return loss + divergence(student["logits"], teacher["logits"]) if "logits" in student else loss

"""Losses between the outputs of a student and those of its teacher.

All are means, in nats or in shares of a variance, so they do not depend on widths, lengths or batch sizes.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError, nearest

IGNORED = -100
"""The label of a position where nothing is predicted, as everywhere in transformers."""
TARGETS = ("hidden", "layers", "vectors", "logits", "labels")
"""What a student can learn from: the last hidden states, those after every layer, the mean vector of each text and how
similar the texts of a batch are, the logits, and the text itself."""


def parse_targets(text: str) -> tuple[str, ...]:
    """``hidden+vectors`` -> ("hidden", "vectors"), in the order of ``TARGETS``. Raises TautError for others."""
    words = text.split("+")
    for word in words:
        if word not in TARGETS:
            raise TautError(f"heal: target {word!r}: {nearest(word, TARGETS)}; join several by +")
    return tuple(name for name in TARGETS if name in words)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, D), (N, D) float -> scalar: the mean squared difference over the teacher's variance around its mean vector.

    0 is a perfect copy; 1 is what the constant mean vector would get.
    """
    spread = teacher.var(0, unbiased=False).mean()
    return (student - teacher).square().mean() / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(B, D), (B, D) unit rows -> scalar: the relative error of the cosines between different rows (Tung & Mori 2019,
    arXiv 1907.09682; changed: over the variance of the teacher's cosines). 0 for less than two rows."""
    if len(student) < 2:
        return student.new_zeros(())
    apart = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    return relative_error((student @ student.T)[apart][:, None], (teacher @ teacher.T)[apart][:, None])


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, C), (N, C) logits -> scalar: the mean Kullback-Leibler divergence of the student's from the teacher's
    distribution over C classes, nats."""
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)


def answers(output: Any, real: Tensor, targets: Collection[str]) -> dict[str, Tensor]:
    """Select from a model's output what is imitated, float32, under the names of ``targets`` except ``labels``.

    ``hidden``: the last states of the N real tokens, (N, D). ``layers``: those of the layers before it, (L - 1, N, D).
    ``vectors``: (B, D), the mean state of each text, of length one. ``logits``: (N, V) of the same tokens, or (B, C) of
    a classifier. ``real`` (B, T) bool marks the real tokens: those of the decoder, if there is one.
    """
    states = output.get("decoder_hidden_states") or output.get("hidden_states")
    last = output["last_hidden_state"] if "last_hidden_state" in output else states[-1]
    selected = {}
    if "hidden" in targets:
        selected["hidden"] = last[real].float()
    if "layers" in targets:
        selected["layers"] = torch.stack([state[real] for state in states[1:-1]]).float()
    if "vectors" in targets:
        weights = real[..., None].float()
        selected["vectors"] = F.normalize((last.float() * weights).sum(1) / weights.sum(1).clamp_min(1), dim=-1)
    if "logits" in targets:
        logits = output["logits"]
        selected["logits"] = (logits[real] if logits.shape[:2] == real.shape else logits).float()
    return selected


def imitation(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """The loss of one batch: a term of weight one for each output of the teacher.

    ``hidden`` and ``layers`` (their mean) count with their relative error; ``vectors`` with theirs and that of their
    similarities; ``logits`` with their divergence.
    """
    terms = []
    for name, target in teacher.items():
        output = student[name]
        match name:
            case "hidden":
                terms.append(relative_error(output, target))
            case "layers":
                pairs = zip(output, target, strict=True)
                terms.append(torch.stack([relative_error(layer, target_layer) for layer, target_layer in pairs]).mean())
            case "vectors":
                terms += [relative_error(output, target), similarity_error(output, target)]
            case "logits":
                terms.append(divergence(output, target))
    return torch.stack(terms).sum()


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V) logits, (B, T) integer labels with -100 where nothing is predicted -> mean cross-entropy, nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

"""How the learning rate and the weight of guides change over a training run, without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from taut.core.errors import TautError

Rate = Literal["cosine", "linear", "constant"]
Fall = Literal["cosine", "linear"]
Mode = Literal["fixed_steps", "matched_flops"]


def rate(done: float, step: float, warmup: float, shape: Rate, floor: float) -> float:
    """The learning rate as a share of its peak.

    ``done`` is the share of the training that is finished, ``step`` the share of one step. The rate rises during the
    share ``warmup`` and is already above 0 in the first step. Then it falls to ``floor``.
    """
    if done < warmup:
        return min(1.0, (done + step) / warmup)
    fallen = min(1.0, (done - warmup) / (1.0 - warmup))
    left = {"cosine": (1.0 + math.cos(math.pi * fallen)) / 2.0, "linear": 1.0 - fallen, "constant": 1.0}[shape]
    return floor + (1.0 - floor) * left


def guide_weight(step: int, steps: int, shape: Fall) -> float:
    """a(t): 1 at step 0, falling to 0 at step ``steps`` and staying there (Wei et al. 2024)."""
    if step >= steps:
        return 0.0
    return (1.0 + math.cos(math.pi * step / steps)) / 2.0 if shape == "cosine" else 1.0 - step / steps


@dataclass(frozen=True)
class Course:
    """The steps of a training run: ``fresh`` ones with new batches, of which the first ``guided`` are guided.

    With ``repeat`` the guided batches are repeated at the end, unguided. This is the published way to spend as many
    FLOPs as dense training on the same tokens.
    """

    fresh: int
    guided: int = 0
    repeat: bool = False

    @property
    def total(self) -> int:
        return self.fresh + (self.guided if self.repeat else 0)

    def batch_of(self, step: int) -> int:
        """The number of the batch that a step reads."""
        return step if step < self.fresh else step - self.fresh


def course(fresh: int, share: float = 0.0, mode: Mode = "fixed_steps") -> Course:
    """Plan a course in which ``share`` (rho) of ``fresh`` steps is guided, rounded down.

    Raises TautError for a share above 1, and for one that guides no step.
    """
    if share > 1.0:
        raise TautError(
            f"guide: share = {share:.4g}: a share is at most 1. The share that matches dense FLOPs is larger if little "
            "of the model is kept: give a share, or keep more"
        )
    # Not int() alone: 0.29 x 100 is a little less than 29.
    guided = math.floor(share * fresh + 1e-9)
    if share and not guided:
        raise TautError(f"guide: share = {share:.4g} of {fresh} steps guides no step; raise the share or the steps")
    return Course(fresh, guided, mode == "matched_flops")

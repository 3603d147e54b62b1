"""How rates and guides change over a training run: numbers from numbers, no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from taut.core.errors import TautError

Rate = Literal["cosine", "linear", "constant"]
Fall = Literal["cosine", "linear"]
Mode = Literal["fixed_steps", "matched_flops"]


def rate(done: float, step: float, warmup: float, shape: Rate, floor: float) -> float:
    """The learning rate as a share of its peak.

    ``done`` is the share of the training that lies behind, ``step`` the share that one step is: the first step of a
    warm-up has one step's share of the rise, not nothing. After the share ``warmup`` it falls to ``floor``.
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
    """The steps of a training run: ``fresh`` ones with batches of their own, of which the first ``guided`` are guided.

    With ``repeat`` those first batches come once more at the end, unguided: the published way to spend as many FLOPs as
    dense training on the same tokens.
    """

    fresh: int
    guided: int = 0
    repeat: bool = False

    @property
    def total(self) -> int:
        return self.fresh + (self.guided if self.repeat else 0)

    def batch_of(self, step: int) -> int:
        """Which batch a step reads."""
        return step if step < self.fresh else step - self.fresh


def course(fresh: int, share: float = 0.0, mode: Mode = "fixed_steps") -> Course:
    """``share`` rho of ``fresh`` steps guided, rounded down. Raises TautError for a guide that would outlast training,
    or guide no step at all."""
    if share > 1.0:
        raise TautError(
            f"guide: share = {share:.4g}: the guide would outlast the training; at most 1. One computed to match dense "
            "FLOPs is too large when little of the model is left: give one, or keep more"
        )
    # Not int() alone: 0.29 x 100 is a little less than 29.
    guided = math.floor(share * fresh + 1e-9)
    if share and not guided:
        raise TautError(f"guide: share = {share:.4g} of {fresh} steps guides no step; give more of either")
    return Course(fresh, guided, mode == "matched_flops")

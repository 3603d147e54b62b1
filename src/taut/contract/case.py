"""A case: one method with some knobs on one model family. It builds what a check needs."""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from taut.contract.tiny import FAMILIES, inputs, logits, tiny
from taut.core.recipe import Recipe
from taut.core.registry import METHODS
from taut.core.slot import KIND_OF_SLOT
from taut.surgery.apply import apply
from taut.surgery.plan import FitsNowhere, Plan, Step, make_plan


@dataclass(frozen=True)
class Case:
    """A method, its knobs and a family; all models are on ``device``.

    ``entry`` is the recipe's entry for the method's slot, without the method's name.
    """

    method: str
    family: str
    entry: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"

    @property
    def label(self) -> str:
        knobs = ",".join(f"{key}={value}" for key, value in self.entry)
        return f"{self.method}[{knobs}]@{self.family}"

    @property
    def kind(self) -> str:
        return self.method.partition(".")[0]

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that this kind of method can fill."""
        return tuple(slot for slot, kind in KIND_OF_SLOT.items() if kind == self.kind)

    def recipe(self, **override: Any) -> Recipe:
        line = {"method": self.method.partition(".")[2], **dict(self.entry), **override}
        return Recipe.parse(dict.fromkeys(self.slots, line), self.label)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0, head: str = "default") -> PreTrainedModel:
        return tiny(self.family, dtype=dtype, seed=seed, head=head).to(self.device)

    def batches(self, model: PreTrainedModel) -> list[dict[str, Tensor]]:
        """Make batches for calibration, of other tokens than the checks use."""
        return [inputs(model, batch=4, length=24, seed=100 + seed) for seed in range(2)]

    def compressed(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        model = self.model(dtype, seed)
        apply(model, self.planned(model), self.batches(model))
        return model

    def planned(self, model: PreTrainedModel, length: int | None = None) -> Plan:
        """Make the plan; ``length`` as in ``make_plan``. Raises FitsNowhere if the method fits no site."""
        return make_plan(model, self.recipe(), length)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the plan, made on shapes alone; none if the method fits no site."""
        return self._outcome if isinstance(self._outcome, tuple) else ()

    @property
    def misfit(self) -> str | None:
        """Why the method fits no site of this family, or None."""
        return self._outcome if isinstance(self._outcome, str) else None

    @cached_property
    def _outcome(self) -> tuple[Step, ...] | str:
        try:
            return self.planned(skeleton(self.family)).steps
        except FitsNowhere as error:
            return error.reasons

    @property
    def decoder(self) -> bool:
        return FAMILIES[self.family].decoder

    def answer(self, model: PreTrainedModel, **options: Any) -> Tensor:
        return logits(model, **inputs(model, **options))


@cache
def skeleton(family: str) -> PreTrainedModel:
    """The tiny model of a family on the meta device."""
    return tiny(family, device="meta")


@cache
def rows() -> dict[str, list[dict[str, Any]]]:
    """Read the recipe entries to test each method with, by method id."""
    return yaml.safe_load(files("taut.contract").joinpath("rows.yaml").read_text())


def cases(
    method: str, families: tuple[str, ...], entries: list[dict[str, Any]] | None = None, device: str = "cpu"
) -> list[Case]:
    """Make a case for every entry of the method and every family. Without entries, its defaults are tested."""
    METHODS.get(method)
    chosen = rows().get(method, [{}]) if entries is None else entries
    return [Case(method, family, tuple(entry.items()), device) for family in families for entry in chosen]

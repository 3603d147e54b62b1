"""One method with some knobs on one family: everything a check needs, built freshly."""

from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from taut.contract.tiny import inputs, is_decoder, logits, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.registry import METHODS
from taut.core.slot import KIND_OF_SLOT
from taut.methods.base import MemoryMethod
from taut.surgery.apply import apply
from taut.surgery.plan import Plan, make_plan


class Skip(Exception):
    """The check does not apply here, with the reason."""


@dataclass(frozen=True)
class Case:
    """``entry`` is what a recipe would say for the method's slot, without the method's name. Everything happens on
    ``device``."""

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
        """Calibration: different tokens than the checks use."""
        return [inputs(model, batch=4, length=24, seed=100 + seed) for seed in range(2)]

    def compressed(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        model = self.model(dtype, seed)
        apply(model, self.planned(model), self.batches(model))
        return model

    def planned(self, model: PreTrainedModel, length: int | None = None) -> Plan:
        """The plan, or Skip with the refusal when the family has no place for the method. ``length`` as make has it."""
        try:
            return make_plan(model, self.recipe(), length)
        except TautError as error:
            if "fits no site" in str(error):
                raise Skip(str(error).partition("fits no site: ")[2]) from None
            raise

    @cached_property
    def decoder(self) -> bool:
        return is_decoder(self.model())

    def need_decoder(self) -> None:
        if not self.decoder:
            raise Skip("an encoder has no past and no future")

    def need_equal_steps(self, model: PreTrainedModel) -> None:
        for step in model.hf_quantizer.surgery.steps:
            if isinstance(step.method, MemoryMethod) and step.method.unequal:
                raise Skip(step.method.unequal)

    def answer(self, model: PreTrainedModel, **options: Any) -> Tensor:
        return logits(model, **inputs(model, **options))


def rows() -> dict[str, list[dict[str, Any]]]:
    """The test row of every method: recipe entries to try, by id."""
    return yaml.safe_load(files("taut.contract").joinpath("rows.yaml").read_text())


def cases(
    method: str, families: tuple[str, ...], entries: list[dict[str, Any]] | None = None, device: str = "cpu"
) -> list[Case]:
    """Every entry of the method's row on every family; a method without a row is tried with its defaults."""
    METHODS.get(method)
    chosen = rows().get(method, [{}]) if entries is None else entries
    return [Case(method, family, tuple(entry.items()), device) for family in families for entry in chosen]

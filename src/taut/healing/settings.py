"""The settings of healing."""

from collections.abc import Mapping
from typing import Any, Literal, Required, Self, TypedDict

from pydantic import Field, field_validator, model_validator

from taut.core.strict import Strict
from taut.healing.losses import parse_targets

Trained = Literal["parts", "norms", "adapters", "body", "all"]


class HealingChoices(TypedDict, total=False):
    """The fields of ``Healing`` as keywords, without ``steps`` and ``seed``."""

    batch: int
    length: int
    by: Literal["model", "layer"]
    target: str
    train: Trained
    rank: int
    learning_rate: float
    warmup: float


class HealingOptions(HealingChoices, total=False):
    """The fields of ``Healing`` as a dictionary."""

    steps: Required[int]
    seed: int


class Healing(Strict):
    """The settings of one healing run. Equal settings on equal text give equal bits."""

    steps: int = Field(ge=0, description="optimizer steps; 0 changes nothing")
    batch: int = Field(32, ge=1, description="texts per step")
    length: int = Field(64, ge=4, description="most tokens of a text; longer texts are cut into several")
    by: Literal["model", "layer"] = Field(
        "model",
        description="model: all blocks at once; layer: one after the other, steps for each, the original on disk",
    )
    target: str = Field(
        "auto",
        description="what to learn from, joined by +: hidden, layers, vectors, logits, labels; auto: hidden+logits "
        "with a head, hidden+vectors for an encoder without one, else hidden",
    )
    train: Trained = Field(
        "parts",
        description="parts: only what the recipe installed; norms: also the norms; adapters: also LoRA on the other "
        "maps, merged at the end; body: all but token tables that were not replaced; or all",
    )
    rank: int = Field(8, ge=1, description="rank of the adapters, with train=adapters")
    learning_rate: float = Field(
        0.03,
        gt=0,
        le=1,
        description="rate of a tensor, as a share of its root mean square times its part's relative error",
    )
    warmup: float = Field(
        0.05, ge=0, lt=1, description="share of the steps in which the rate rises; then it follows a cosine"
    )
    seed: int = Field(0, ge=0, description="seed of the order of texts, of adapters and of random steps")

    @field_validator("target")
    @classmethod
    def _targets(cls, target: str) -> str:
        return target if target == "auto" else "+".join(parse_targets(target))

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.by == "layer" and self.target != "auto":
            raise ValueError(f"target = {self.target!r}: by=layer imitates the output of each block; leave target out")
        return self

    @classmethod
    def parse(cls, choices: "int | Mapping[str, Any] | Healing", seed: int = 0) -> "Healing":
        """Parse a number of steps, or settings by name. ``seed`` is the default of theirs.

        Raises TautError that names the wrong setting.
        """
        if isinstance(choices, Healing):
            return choices
        values = choices if isinstance(choices, Mapping) else {"steps": choices}
        return cls.checked({"seed": seed, **values}, "heal")

"""What healing may be told."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from taut.core.errors import TautError, nearest
from taut.training.losses import parse_targets

Trained = Literal["parts", "norms", "adapters", "body", "all"]


class Healing(BaseModel):
    """The choices of one healing run. Two runs with equal choices on equal text give equal bits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=0, description="optimizer steps; 0 changes nothing")
    batch: int = Field(32, ge=1, description="texts in a step")
    length: int = Field(64, ge=4, description="tokens of a text at most; longer ones are cut into several")
    by: Literal["model", "layer"] = Field(
        "model",
        description="model: the whole at once; layer: one block after the other, steps for each, the original on disk",
    )
    target: str = Field(
        "auto",
        description="what to learn from, joined by +: hidden, layers, vectors, logits, labels; auto: hidden+logits "
        "where there is a head, hidden+vectors for an encoder without one, else hidden",
    )
    train: Trained = Field(
        "parts",
        description="parts: only what the recipe installed; norms: and the norms; adapters: and LoRA on the other "
        "maps, merged at the end; body: all but token tables that stay; or all",
    )
    rank: int = Field(8, ge=1, description="of the adapters, with train=adapters")
    learning_rate: float = Field(
        0.03, gt=0, le=1, description="of a tensor, as a share of its root mean square times its part's relative error"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises; then a cosine")
    seed: int = Field(0, ge=0, description="of the order of the texts")

    @field_validator("target")
    @classmethod
    def _known(cls, target: str) -> str:
        return target if target == "auto" else "+".join(parse_targets(target))

    @classmethod
    def parse(cls, choices: "int | dict[str, Any] | Healing", seed: int = 0) -> "Healing":
        """A number of steps, or several choices by name; ``seed`` where they have none. Raises TautError naming the
        choice that is wrong."""
        if isinstance(choices, Healing):
            return choices
        given = {"seed": seed} | (choices if isinstance(choices, dict) else {"steps": choices})
        for key in given:
            if key not in cls.model_fields:
                raise TautError(f"heal: no choice {key!r}: {nearest(key, cls.model_fields)}")
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(step) for step in first["loc"])
            got = "" if first["type"] == "missing" else f" = {first['input']!r}"
            raise TautError(f"heal: {key}{got}: {first['msg']}") from None

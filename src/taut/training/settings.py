"""What healing may be told."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taut.core.errors import TautError, nearest

Target = Literal["auto", "hidden", "logits"]
Trained = Literal["parts", "norms", "all"]


class Healing(BaseModel):
    """The choices of one healing run. Two runs with equal choices on equal text give equal bits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=0, description="optimizer steps; 0 changes nothing")
    batch: int = Field(32, ge=1, description="texts in a step")
    length: int = Field(64, ge=4, description="tokens of a text at most; longer ones are cut into several")
    target: Target = Field(
        "auto",
        description="what to imitate: last hidden states, or the head's logits too; auto: logits where there is a head",
    )
    train: Trained = Field("parts", description="parts: only what the recipe installed; norms: and the norms; or all")
    learning_rate: float = Field(
        0.03, gt=0, le=1, description="of a tensor, as a share of its root mean square times its part's relative error"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises; then a cosine")
    seed: int = Field(0, ge=0, description="of the order of the texts")

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

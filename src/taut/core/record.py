"""The record of a trial: quantities with their samples, and what they were measured on."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

FORMER_COSTS = {"tighten_seconds": "compress_seconds"}
"""The former names of costs, in records of earlier versions, with the present names."""


class Quantity(BaseModel):
    """A value with its unit, its raw samples and how it was measured. A value that could not be measured is None.

    ``samples`` are repeats of a timing, or one score per item of a task. Two records of the same task can then be
    compared item by item. ``low`` and ``high`` bound the 95 % interval, if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | None
    unit: str
    how: str
    samples: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None


class Score(BaseModel):
    """One metric of one task: the model's value, and the shortcut baselines computed on the same split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str
    quantity: Quantity
    better: Literal["higher", "lower"]
    baselines: dict[str, float] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict, description="source, split, items, sha256 of the text")


class Record(BaseModel):
    """One cell of a study. It is written once and never edited. A failed trial has a record with a reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    id: str
    study: str
    study_digest: str
    trial: str = Field(description="readable name: model, recipe, seed")
    model: str
    recipe_name: str
    recipe: dict[str, Any]
    recipe_digest: str
    seed: int
    text: str = Field("builtin", description="the text for calibration and healing")
    heal: int = Field(0, description="steps of healing after compressing")
    status: Literal["done", "failed"]
    reason: str | None = None
    expect: Literal["done", "failed"] = Field("done", description="the status that the study expects")
    scores: tuple[Score, ...] = ()
    costs: dict[str, Quantity] = Field(default_factory=dict)
    bytes_per_slot: dict[str, int] = Field(default_factory=dict)
    plan: tuple[dict[str, Any], ...] = ()
    untouched: tuple[tuple[str, str], ...] = ()
    environment: dict[str, Any] = Field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0

    @field_validator("costs", mode="before")
    @classmethod
    def _renamed(cls, costs: Any) -> Any:
        """Replace the former names of costs in records of earlier versions."""
        return (
            {FORMER_COSTS.get(name, name): cost for name, cost in costs.items()} if isinstance(costs, dict) else costs
        )

"""The record of a trial: quantities with their samples, and what they were measured on."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from taut.core.table import Table, clip, data_frame

FORMER_COSTS = {"tighten_seconds": "compress_seconds"}
"""The former names of costs, in records of earlier versions, with the present names."""
NUMBERS = ("value", "low", "high", "unit")
"""The columns of a quantity in a data frame."""


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

    @property
    def number(self) -> str:
        """The value as text for people, without its unit."""
        if self.value is None:
            return "n/a"
        return f"{self.value:,.0f}" if self.unit == "bytes" else f"{self.value:.4g}"

    def __repr__(self) -> str:
        bounds = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        samples = f", {len(self.samples)} samples" if self.samples else ""
        return clip(f"Quantity({f'{self.number} {self.unit}'.strip()}{bounds}{samples}; {self.how})")

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        """The quantity as one dictionary, ready for JSON, every number unrounded."""
        return self.model_dump(mode="json")


class Score(BaseModel):
    """One metric of one task: the model's value, and the shortcut baselines computed on the same split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str
    quantity: Quantity
    better: Literal["higher", "lower"]
    baselines: dict[str, float] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict, description="source, split, items, sha256 of the text")

    def __repr__(self) -> str:
        baselines = "".join(f", {name} {value:.4g}" for name, value in self.baselines.items())
        return clip(f"Score({self.task} {self.metric} {self.quantity.number}, {self.better} is better{baselines})")

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return Scores([self])._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The score as one dictionary, ready for JSON, every number unrounded."""
        return self.model_dump(mode="json")

    def to_pandas(self) -> Any:
        """One row; see ``Scores.to_pandas``."""
        return Scores([self]).to_pandas()


class Scores(tuple[Score, ...]):
    """The scores of one model on one task: a tuple that shows itself as a table."""

    def table(self) -> Table:
        rows = []
        for score in self:
            quantity = score.quantity
            between = "-" if quantity.low is None else f"{quantity.low:.4f} to {quantity.high:.4f}"
            baselines = ", ".join(f"{name} {value:.4f}" for name, value in score.baselines.items())
            data = ", ".join(f"{name} {value[:32]}" for name, value in score.data.items())
            rows.append((score.task, score.metric, quantity.number, between, baselines, data))
        return Table(("task", "metric", "score", "95 % interval", "baselines", "data"), rows)

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_dict(self) -> dict[str, Any]:
        """The scores as one dictionary, ready for JSON, every number unrounded."""
        return {"scores": [score.to_dict() for score in self]}

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row for each score. Raises TautError if pandas is not installed."""
        rows = [
            {"task": score.task, "metric": score.metric, **_numbers(score.quantity), "better": score.better}
            for score in self
        ]
        return data_frame(rows, ("task", "metric", *NUMBERS, "better"))


class Measurements(dict[str, Quantity]):
    """What was measured of one model: a dictionary of quantities by name that shows itself as a table."""

    def table(self) -> Table:
        rows = []
        for name, quantity in self.items():
            between = "-" if quantity.low is None else f"{quantity.low:.4g} to {quantity.high:.4g}"
            rows.append((name, quantity.number, quantity.unit, between, quantity.how))
        return Table(("quantity", "value", "unit", "95 % interval", "how"), rows)

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_dict(self) -> dict[str, Any]:
        """The quantities as one dictionary, ready for JSON, every number unrounded."""
        return {name: quantity.to_dict() for name, quantity in self.items()}

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row for each quantity. Raises TautError if pandas is not installed."""
        rows = [{"quantity": name, **_numbers(quantity)} for name, quantity in self.items()]
        return data_frame(rows, ("quantity", *NUMBERS))


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

    def __repr__(self) -> str:
        results = [f"{score.task} {score.metric} {score.quantity.number}" for score in self.scores]
        results += [f"{len(self.costs)} costs"] if self.costs else []
        how = ", ".join(results) if self.status == "done" else self.reason
        return clip(f"Record({self.trial}: {self.status}: {how})")

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        """The record as one dictionary, ready for JSON, every number unrounded."""
        return self.model_dump(mode="json")

    @field_validator("costs", mode="before")
    @classmethod
    def _renamed(cls, costs: Any) -> Any:
        """Replace the former names of costs in records of earlier versions."""
        return (
            {FORMER_COSTS.get(name, name): cost for name, cost in costs.items()} if isinstance(costs, dict) else costs
        )


def _numbers(quantity: Quantity) -> dict[str, Any]:
    return {name: getattr(quantity, name) for name in NUMBERS}

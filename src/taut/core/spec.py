"""The specification of a trial: everything that determines its outcome, and the id made from it."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from taut.core.recipe import Recipe
from taut.core.record import Record


class TrialSpec(BaseModel):
    """One cell of a study.

    ``study``, ``study_digest``, ``recipe_name``, ``ram``, ``seconds`` and ``expect`` do not enter the id, so that two
    studies with the same trial share one record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    study_digest: str = ""
    model: str
    model_digest: str | None = Field(None, description="fingerprint of a local folder; None for a model given by name")
    recipe_name: str
    recipe: dict[str, Any]
    seed: int = 0
    tasks: tuple[dict[str, Any], ...] = Field((), description="name and options of each task")
    measure: dict[str, Any] = Field(default_factory=dict)
    text: str = Field("builtin", description="text for calibration and healing; see taut.data.calibration_texts")
    heal: int = Field(0, description="steps of healing after compressing")
    device: str = "cpu"
    dtype: str = "float32"
    ram: int | None = Field(None, description="most bytes that a trial may need")
    seconds: float | None = Field(None, description="longest time that a trial may take, in seconds")
    expect: Literal["done", "failed"] = "done"

    @property
    def id(self) -> str:
        shared = {"model", "model_digest", "recipe", "seed", "tasks", "measure", "device", "dtype"}
        # Without a recipe, text and healing change nothing, so they must not change the id.
        content = self.model_dump(include=shared)
        if self.recipe and self.text != "builtin":
            content["text"] = self.text
        if self.recipe and self.heal:
            content["heal"] = self.heal
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.model} · {self.recipe_name} · seed {self.seed}"

    def record(self, status: Literal["done", "failed"], **found: Any) -> Record:
        """The record of this trial: its specification, and what was ``found`` (scores, costs, reason, ...)."""
        return Record(
            id=self.id,
            study=self.study,
            study_digest=self.study_digest,
            trial=self.name,
            model=self.model,
            recipe_name=self.recipe_name,
            recipe=self.recipe,
            recipe_digest=Recipe.load(self.recipe).digest,
            seed=self.seed,
            text=self.text,
            heal=self.heal,
            status=status,
            expect=self.expect,
            **found,
        )

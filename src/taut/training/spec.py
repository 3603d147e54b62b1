"""The specification of a training run: one file, checked before anything else is opened."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.strict import Strict, kind, read_yaml
from taut.training.schedule import Fall, Mode, Rate

Objective = Literal["auto", "causal", "masked"]
Precision = Literal["float32", "bfloat16", "float16"]
Report = Literal["none", "tensorboard", "trackio"]
Slot = Literal["feedforward", "projection"]


def _number(value: Any) -> Any:
    """Read numbers such as 2e6, which YAML takes for text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Budget(Strict):
    """How long to train: exactly one of four limits. Evaluation and saving never count."""

    steps: int | None = Field(None, ge=1, description="optimizer steps")
    tokens: int | None = Field(None, ge=1, description="tokens read, rounded down to whole steps")
    flops: float | None = Field(None, gt=0, description="training FLOPs, including those of guides")
    seconds: float | None = Field(None, gt=0, description="seconds of training; the rate then follows the clock")

    @field_validator("steps", "tokens", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return _number(value)

    @model_validator(mode="after")
    def _one(self) -> Self:
        names = [name for name in ("steps", "tokens", "flops", "seconds") if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(f"give exactly one of steps, tokens, flops, seconds, not {' and '.join(names) or 'none'}")
        return self


class Evaluate(Strict):
    """The loss on held-out text, which is not trained on."""

    every: float = Field(0.1, gt=0, le=1, description="share of the budget between evaluations; one is at the end")
    tokens: int = Field(50_000, ge=1, description="most tokens to evaluate on, spread evenly over the held-out text")
    share: float = Field(
        0.05, gt=0, lt=1, description="share of every text to hold out, at its end; unless text is given"
    )
    text: tuple[str, ...] = Field((), description="names of texts to evaluate on instead")

    @field_validator("text", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _names(value)


class Save(Strict):
    """When to write a checkpoint. Each one replaces the previous one."""

    seconds: float = Field(60.0, ge=0, description="seconds between checkpoints, or 20 times the time of writing one")
    steps: int | None = Field(None, ge=1, description="steps between checkpoints, instead of seconds")


class Guide(Strict):
    """Self-guided training (Wei et al. 2024): dense weights beside the structured ones, faded out."""

    mode: Mode = Field(
        "fixed_steps",
        description="fixed_steps: no more steps than without; matched_flops: guided batches are repeated at the end",
    )
    share: float | None = Field(
        None,
        gt=0,
        description="share of the steps, guided from the first on; default: 0.5, or what matches dense FLOPs",
    )
    schedule: Fall = Field("cosine", description="how the weight of the guide falls from 1 to 0")
    stochastic: bool = Field(True, description="compute each guide with its weight as probability: half the FLOPs")
    slots: tuple[Slot, ...] = Field(("feedforward", "projection"), description="slots whose linear parts are guided")


class TrainSpec(Strict):
    """One training run. Equal specs on equal text, processes and machine give equal bits."""

    model: str = Field(description="folder, Hub id, or scratch spec such as llama:hidden_size=256")
    recipe: dict[str, Any] = Field(default_factory=dict, description="a recipe: slots, a file, or a shipped name")
    text: tuple[str, ...] = Field(min_length=1, description="named data, files, or builtin")
    exclude: tuple[str, ...] = Field((), description="evaluation data whose sentences are removed, such as stsb:dev")
    tokenizer: str | None = Field(
        None, description="folder or Hub id; bytes; or bpe:4096, trained on the text; by default the model's own"
    )
    length: int = Field(256, ge=4, description="tokens per row")
    pack: bool = Field(True, description="join documents and cut them into full rows; else a padded row per paragraph")
    batch: int = Field(8, ge=1, description="rows per step, in all processes together")
    carry_memory: bool = Field(
        False, description="each row continues the same row of the previous batch and keeps its memory"
    )
    reconstruction: float = Field(
        0.0,
        ge=0,
        description="weight of the attention error due to compressed entries; a memory learns to compress only from "
        "that error, and nothing else learns from it; 0: it learns from the loss",
    )
    accumulate: int = Field(1, ge=1, description="pieces into which a process cuts its share of a step")
    objective: Objective = Field("auto", description="causal: next tokens; masked: hidden tokens; auto: by the model")
    masked: float = Field(0.15, gt=0, lt=1, description="share of the tokens in a row that masked training hides")
    learning_rate: float = Field(1e-3, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the training in which the rate rises")
    schedule: Rate = Field("cosine", description="how the rate falls after that")
    floor: float = Field(0.1, ge=0, le=1, description="final rate, as a share of learning_rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="betas of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of matrices; none for biases and norms")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no limit")
    precision: Precision = Field("float32", description="dtype of the computation; weights are float32 during training")
    seed: int = Field(0, ge=0)
    budget: Budget
    evaluate: Evaluate = Evaluate()
    save: Save = Save()
    report_to: Report = Field("none", description="where to log losses during the run")
    guide: Guide | None = Field(None, description="self-guided training of what the recipe installs; {} for defaults")
    former = {"lanes": "carry_memory"}

    @field_validator("text", "exclude", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _names(value)

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each must be at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"batch = {self.batch} is not a multiple of accumulate = {self.accumulate}")
        if self.guide is not None and not self.recipe:
            raise ValueError("guide: there is no recipe, so nothing to guide")
        if self.guide is not None and self.budget.seconds is not None:
            raise ValueError("guide: its schedule counts steps; give the budget in steps, tokens or flops")
        if self.guide is not None and (self.guide.share or 0.0) > 1.0:
            raise ValueError(f"guide.share = {self.guide.share:g}: a share is at most 1")
        return self

    @classmethod
    def load(cls, source: "str | Path | dict[str, Any] | TrainSpec") -> "TrainSpec":
        """Load a YAML file or a mapping. Raises TautError that names the file, the key and the nearest valid choice."""
        if isinstance(source, TrainSpec):
            return source
        if isinstance(source, dict):
            return cls.parse(source)
        return cls.parse(read_yaml(Path(source), "training spec"), str(source), Path(source).parent)

    @classmethod
    def parse(cls, content: Any, source: str = "train", base: Path | None = None) -> "TrainSpec":
        """Parse a mapping as written in YAML. A recipe file is first looked for in the folder ``base``."""
        if not isinstance(content, dict):
            raise TautError(f"{source}: a training spec is a mapping with model, text and budget, not {kind(content)}")
        recipe = content.get("recipe")
        if isinstance(recipe, str):
            path = base / recipe if base else Path(recipe)
            recipe = path if path.is_file() else recipe
        if recipe is not None:
            try:
                content = content | {"recipe": Recipe.load(recipe).check_methods().to_dict()}
            except TautError as error:
                raise TautError(f"{source}: {'' if isinstance(recipe, dict) else 'recipe: '}{error}") from None
        values = {key: value for key, value in content.items() if value is not None or key != "recipe"}
        return cls.checked({key: _number(value) if key == "batch" else value for key, value in values.items()}, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the record and for comparison."""
        return self.model_dump(mode="json")

    def change(self, other: dict[str, Any]) -> str | None:
        """The first difference from an earlier run's ``to_dict``, in words, or None.

        Keys that its version did not have count as the defaults. Renamed keys count under their present names.
        """
        defaults = TrainSpec(model=self.model, text=self.text, budget=self.budget)
        other = {self.former.get(key, key): value for key, value in other.items()}
        now, before = _flat(self.to_dict()), _flat(defaults.to_dict() | other)
        for key in {**now, **before}:
            if now.get(key) != before.get(key):
                return f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        return None


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested keys as dotted ones, so that messages name a difference exactly."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat

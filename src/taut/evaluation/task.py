"""The contract of a task: what it measures, which models it fits, and its scores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.core.errors import TautError
from taut.core.progress import Progress, silent
from taut.core.record import Quantity, Score
from taut.core.registry import TASKS
from taut.core.strict import parse_options
from taut.data import Data
from taut.surgery.modes import evaluating

Kind = Literal["causal", "masked", "sequence to sequence", "states"]


class TaskOptions(BaseModel):
    """The options that every task has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(None, description="a name, a file or hub:OWNER/NAME:SPLIT:COLUMNS; see taut.data")
    split: str | None = Field(None, description="the split of the data; by default the usual evaluation split")
    limit: int | None = Field(None, ge=1, description="use only this many items, from the start of the fixed order")
    batch_size: int = Field(32, ge=1, le=4096, description="sequences run at once; does not change the score")
    max_length: int = Field(256, ge=2, description="tokens kept of each text, special tokens included")


class Task(ABC):
    """One evaluation. Subclasses are final; their file name is the id.

    Deterministic: the same model, options and seed give the same scores. A task leaves the model unchanged.
    """

    id: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[TaskOptions]] = TaskOptions
    needs_reference: ClassVar[bool] = False
    """Whether the task also needs the original model, to compare the scored model with it."""

    def __init__(self, options: TaskOptions | None = None) -> None:
        self.options = self.Options() if options is None else options

    @classmethod
    def parse(cls, options: dict[str, Any], where: str = "task") -> "Task":
        """Check options from a study or the command line.

        Raises TautError that names the wrong option and the nearest valid one.
        """
        return cls(parse_options(cls.Options, options, where, cls.id, "option"))

    @abstractmethod
    def fits(self, model: PreTrainedModel) -> str | None:
        """None if the task can run on this model, else the reason in words."""

    @abstractmethod
    def evaluated(self) -> Data:
        """The texts used for scoring, which calibration and healing must not use. Raises TautError without data."""

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        reference: PreTrainedModel | None = None,
    ) -> tuple[Score, ...]:
        """Score a model. ``reference`` is the original model, for tasks that compare with it.

        Raises TautError if the task does not fit the model, or if the data or a needed reference is missing.
        """
        reason = self.fits(model)
        if reason:
            raise TautError(f"task {self.id}: {reason}")
        with evaluating(model), evaluating(model if reference is None else reference):
            return self.scores(model, tokenizer, seed, progress or silent, reference)

    @abstractmethod
    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        """Compute the scores that ``evaluate`` returns, for a model that fits and is in evaluation mode."""

    def score(
        self,
        metric: str,
        unit: str,
        how: str,
        samples: Sequence[float],
        better: Literal["higher", "lower"],
        data: dict[str, str],
        baselines: dict[str, float] | None = None,
        value: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Score:
        """Build a Score of this task. ``value`` defaults to the mean of the samples; ``interval`` is the 95 % one."""
        samples = tuple(float(sample) for sample in samples)
        value = math.fsum(samples) / len(samples) if value is None else value
        low, high = interval or (None, None)
        quantity = Quantity(value=value, unit=unit, how=how, samples=samples, low=low, high=high)
        return Score(
            task=self.id, metric=metric, quantity=quantity, better=better, baselines=baselines or {}, data=data
        )


def parse_task(content: dict[str, Any]) -> Task:
    """The task that ``content["name"]`` names, with the other entries as its options. Raises TautError for a wrong
    name or option."""
    options = {key: value for key, value in content.items() if key != "name"}
    return TASKS.get(content["name"]).parse(options, f"task {content['name']}")


def kind(model: PreTrainedModel) -> Kind:
    """The kind of a model by its output: next-token logits, logits of masked tokens, or hidden states."""
    if model.config.is_encoder_decoder:
        return "sequence to sequence"
    if model.can_generate():
        return "causal"
    return "masked" if model.get_output_embeddings() is not None else "states"


def writes_text(model: PreTrainedModel) -> str | None:
    """None if a model predicts the next token, else the reason."""
    output = kind(model)
    return None if output == "causal" else f"{type(model).__name__} does not predict the next token ({output})"


def reads_text(model: PreTrainedModel) -> str | None:
    """None if a model takes token ids, and so can turn texts into vectors, else the reason."""
    if model.main_input_name != "input_ids":
        return f"{type(model).__name__} reads {model.main_input_name}, not token ids"
    return None

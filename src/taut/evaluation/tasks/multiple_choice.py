"""Multiple-choice questions, asked as lm-evaluation-harness asks them."""

import importlib
import math
from collections import Counter
from typing import ClassVar

import torch
from pydantic import Field
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import usable_length
from taut.evaluation._language import CACHED
from taut.evaluation.task import Task, TaskOptions, writes_text

KEPT_FOR_EXAMPLES = 10
"""One row in this many, from the end of the fixed order, is never scored: worked examples are drawn from these rows."""


class MultipleChoiceOptions(TaskOptions):
    """Options of multiple_choice."""

    data: str = Field("openbookqa", description="openbookqa, arc_easy, arc_challenge, piqa, boolq, or a JSON file")
    limit: int | None = Field(1000, ge=1, description="number of questions, from the start of the fixed order")
    shots: int = Field(0, ge=0, description="worked examples before each question, from rows that are never scored")
    batch_size: int = Field(8, ge=1, le=4096, description="prompts run at once; does not change the score")
    max_length: int = Field(
        2048, ge=2, description="tokens per prompt with its answer; a longer one is cut at its start"
    )
    cached: int | None = Field(None, ge=1, description=CACHED)


class MultipleChoice(Task):
    """Chooses the answer that is most likely after the question (``acc``), or most likely for its length in
    characters (``acc_norm``).

    Prompts, requests and metrics are those of lm-evaluation-harness (Gao et al. 2021). The rows are local files, with
    other splits than in published tables: compare results only with results of this task.
    """

    id = "multiple_choice"
    summary = "multiple-choice questions (OpenBookQA, ARC, PIQA, BoolQ), with or without worked examples"
    Options: ClassVar[type[TaskOptions]] = MultipleChoiceOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return writes_text(model)

    def evaluated(self) -> data.Data:
        return self.splits()[0]

    def splits(self) -> tuple[data.Data, data.Data]:
        """The questions to score, and the questions to draw examples from; no question is in both."""
        whole = data.questions(self.options.data, self.options.split)
        kept = math.ceil(len(whole.rows) / KEPT_FOR_EXAMPLES)
        scored = data.Data(whole.source, whole.split, whole.rows[:-kept]).head(self.options.limit)
        examples = data.Data(whole.source, whole.split, whole.rows[-kept:] if kept else ())
        if not scored.rows or len(examples.rows) < self.options.shots:
            raise TautError(
                f"task {self.id}: {self.options.data} has {len(whole.rows)} questions, {kept} of them kept for "
                f"examples; expected at least 1 to score, and {self.options.shots} for shots = {self.options.shots}"
            )
        return scored, examples

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        try:
            harness = importlib.import_module("taut.evaluation._harness")
        except ImportError as error:
            raise TautError(f"task {self.id}: needs lm_eval ({error}): pip install 'taut[eval]'") from None
        options = self.options
        scored, examples = self.splits()
        length = usable_length(model, tokenizer, options.max_length)
        with torch.inference_mode():
            answers = harness.ask(
                model,
                tokenizer,
                options.data,
                scored.rows,
                examples.rows,
                shots=options.shots,
                seed=seed,
                max_length=length,
                batch_size=options.batch_size,
                cached=options.cached,
                progress=progress,
            )
        if not answers.asked:
            raise TautError(f"task {self.id}: every question has an answer of more than {length} tokens")
        rows = [scored.rows[place] for place in answers.asked]
        how = f"{answers.version}; {options.shots} worked examples before each question"
        how += f", drawn with seed {seed}" if options.shots else ""
        how += f"; at most {length} tokens, {answers.cut} prompts cut at their beginning"
        skipped = len(scored.rows) - len(rows)
        how += f", {skipped} questions skipped because of a longer answer" if skipped else ""
        how += f"; {options.cached} at a time through the cache" if options.cached else ""
        facts = scored.facts(len(rows))
        return tuple(
            self.score(
                metric,
                "share",
                f"{how}; samples: 1 if correct, else 0; Wilson interval",
                right,
                "higher",
                facts,
                shortcuts(rows),
                interval=wilson(right),
            )
            for metric, right in answers.right.items()
        )


def shortcuts(rows: list[tuple[str, ...]]) -> dict[str, float]:
    """Accuracies of three shortcuts: guessing, always taking the most frequent correct place, or the longest answer."""
    places = [int(row[2]) for row in rows]
    longest = [max(range(len(row) - 3), key=lambda place, row=row: len(row[3 + place])) for row in rows]
    return {
        "chance": sum(1 / (len(row) - 3) for row in rows) / len(rows),
        "most_frequent_place": Counter(places).most_common(1)[0][1] / len(rows),
        "longest_answer": sum(map(int.__eq__, places, longest)) / len(rows),
    }


def wilson(right: list[float]) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (1927): it stays within 0 to 1 and suits few questions too."""
    interval = binomtest(round(sum(right)), len(right)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)

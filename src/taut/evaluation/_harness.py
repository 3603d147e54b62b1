"""Multiple choice as lm-evaluation-harness does it: its prompts, its requests, its reader of models, its metrics.

Imported by the task that needs it alone: the harness is an extra.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import lm_eval
import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.data.questions import Question
from taut.evaluation._language import logits
from taut.evaluation.task import Progress

PROMPTS = {
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    # Its own file says no more than that it is the easy one with other rows.
    "arc_challenge": "arc/arc_easy.yaml",
}
"""Where the harness keeps the published prompt of each set, below its folder of tasks."""
OTHERS = "arc_easy"
"""The set whose prompt questions from a file of the user's get: ``Question: ... Answer:``."""
HUB_FIELDS = ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "tag")


@dataclass(frozen=True)
class Answers:
    """``right``: for each metric 1 or 0 for each question asked; ``asked``: their places among those given; ``cut``:
    prompts that lost their beginning; ``version``: what the harness calls itself and its prompt."""

    right: dict[str, list[float]]
    asked: list[int]
    cut: int
    version: str


class Reader(HFLM):
    """The harness's reader of a model in memory. Only the pass itself is ours: without a cache that nobody reads, or
    ``cached`` tokens at a time through it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        cached: int | None,
    ) -> None:
        # The harness may give a tokenizer a padding token; the user's stays as it is.
        tokenizer = copy.deepcopy(tokenizer)
        super().__init__(
            model, backend="causal", tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, dtype=None
        )
        self._cached = cached

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """(B, T) ids, padded on the right -> (B, T, V) logits. What is right of a token does not change its logits."""
        return logits(self.model, inps.tolist(), self._cached)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    shots: int,
    seed: int,
    max_length: int,
    batch_size: int,
    cached: int | None,
    progress: Progress,
) -> Answers:
    """Put ``questions`` to a model, each behind ``shots`` of the ``examples``, drawn with ``seed``.

    A question one of whose answers has more than ``max_length`` tokens is not asked.
    """
    with _quiet():
        task, version = published(name, questions, examples, shots, seed)
        reader = Reader(model, tokenizer, max_length, batch_size, cached)
        rows: list[tuple[int, dict[str, Any], list[Any]]] = []
        cut = 0
        for place, document in task.doc_iterator():
            context = task.fewshot_context(doc=document, num_fewshot=shots)
            requests = task.construct_requests(document, context, metadata=(name, place, 1))
            before = len(reader.tok_encode(context))
            sizes = [len(reader.tok_encode("".join(request.args))) for request in requests]
            if max(sizes) - before <= max_length:
                rows.append((place, document, requests))
                cut += max(sizes) > max_length + 1
        right: dict[str, list[float]] = {}
        # Several batches at once, so that the harness has lengths to sort by.
        step = 4 * batch_size
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            asked = [request for _, _, requests in some for request in requests]
            answers = iter(reader.loglikelihood(asked, disable_tqdm=True))
            for _, document, requests in some:
                found = task.process_results(document, [next(answers) for _ in requests])
                for metric, value in found.items():
                    right.setdefault(metric, []).append(float(value))
            progress(start + len(some), len(rows))
    return Answers(right, [place for place, _, _ in rows], cut, version)


def published(
    name: str, questions: Sequence[Question], examples: Sequence[Question], shots: int, seed: int
) -> tuple[ConfigurableTask, str]:
    """The harness's own task of that name, with our rows instead of those of a hub, and its version."""
    prompt = name if name in PROMPTS else OTHERS
    text = files("lm_eval").joinpath("tasks", PROMPTS[prompt]).read_text(encoding="utf-8")
    config = {key: value for key, value in yaml.safe_load(text).items() if key not in HUB_FIELDS}
    splits = {
        "scored": Dataset.from_list([document(prompt, row) for row in questions]),
        "examples": Dataset.from_list([document(prompt, row) for row in examples]),
    }
    version = f"lm_eval {lm_eval.__version__}, prompt of {prompt} version {config['metadata']['version']}"
    config |= {"task": name, "custom_dataset": lambda **_: splits, "num_fewshot": shots}
    task = ConfigurableTask(config=config | {"test_split": "scored", "fewshot_split": "examples"})
    task.set_fewshot_seed(seed)
    return task, version


def document(name: str, row: Question) -> dict[str, Any]:
    """A question in the fields that the published prompt of that name reads."""
    passage, question, right, *choices = row
    labels = [chr(ord("A") + place) for place in range(len(choices))]
    if name == "piqa":
        return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": int(right)}
    if name == "boolq":
        return {"passage": passage, "question": question, "label": int(right)}
    if name == "openbookqa":
        key = "question_stem"
    else:
        key, question = "question", f"{passage}\n{question}" if passage else question
    return {key: question, "choices": {"text": choices, "label": labels}, "answerKey": labels[int(right)]}


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of a model in memory and of rows that are no hub's: both are meant."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

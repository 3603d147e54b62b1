"""Multiple choice as lm-evaluation-harness does it: its prompts, requests, model wrapper and metrics.

Only the task that needs it imports this module, because the harness is an optional dependency.
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

from taut.core.progress import Progress
from taut.data.questions import Question
from taut.evaluation._language import logits

PROMPTS = {
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    # The harness's own file for it only refers to arc_easy, with other rows.
    "arc_challenge": "arc/arc_easy.yaml",
}
"""The file with the published prompt of each data set, relative to the harness's folder of tasks."""
OTHERS = "arc_easy"
"""Questions from a user's own file get the prompt of this data set: ``Question: ... Answer:``."""
HUB_FIELDS = ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "tag")


@dataclass(frozen=True)
class Answers:
    """The results of a run.

    ``right``: for each metric, 1 or 0 for each question asked. ``asked``: the indices of these questions among all
    given ones. ``cut``: the number of prompts that lost their beginning. ``version``: the versions of the harness and
    of its prompt.
    """

    right: dict[str, list[float]]
    asked: list[int]
    cut: int
    version: str


class Reader(HFLM):
    """The harness's wrapper of a model in memory, with our own forward pass.

    The pass uses no cache, or feeds ``cached`` tokens at a time through one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        cached: int | None,
    ) -> None:
        # The harness may add a padding token to the tokenizer; the user's own must stay unchanged.
        tokenizer = copy.deepcopy(tokenizer)
        super().__init__(
            model, backend="causal", tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, dtype=None
        )
        self._cached = cached

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """(B, T) ids, padded on the right -> (B, T, V) logits. No token changes the logits to its left."""
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
    """Ask a model ``questions``, each after ``shots`` of the ``examples``, which are drawn at random with ``seed``.

    A question is skipped if one of its answers has more than ``max_length`` tokens.
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
        # Several batches at once, so that the harness can sort them by length.
        step = 4 * batch_size
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            asked = [request for _, _, requests in batch for request in requests]
            answers = iter(reader.loglikelihood(asked, disable_tqdm=True))
            for _, document, requests in batch:
                metrics = task.process_results(document, [next(answers) for _ in requests])
                for metric, value in metrics.items():
                    right.setdefault(metric, []).append(float(value))
            progress(start + len(batch), len(rows))
    return Answers(right, [place for place, _, _ in rows], cut, version)


def published(
    name: str, questions: Sequence[Question], examples: Sequence[Question], shots: int, seed: int
) -> tuple[ConfigurableTask, str]:
    """The harness's own task called ``name``, with our rows instead of rows from the Hub, and its version."""
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
    """A question with the field names that the published prompt called ``name`` expects."""
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
    """Hide the harness's warnings about a model in memory and about rows from elsewhere: both are intended."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

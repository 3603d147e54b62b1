"""Tests whether a language model can recall a value by its key, many segments later."""

import random
import re
from collections import Counter
from functools import cache
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._language import CACHED, logits
from taut.evaluation.task import Task, TaskOptions, writes_text

KEYS, VALUES, FILLERS = 64, 64, 128
"""The number of words of each kind: frequent words of the built-in text, each of one kind only."""


class KeyValueRecallOptions(TaskOptions):
    """Options of key_value_recall."""

    data: None = Field(None, description="not used: the texts are generated")
    split: None = Field(None, description="not used")
    limit: int = Field(200, ge=1, description="number of texts, with one question each")
    pairs: int = Field(16, ge=2, le=KEYS, description="segments per text, each with a key and its value")
    fillers: int = Field(5, ge=0, description="meaningless words after each value")
    between: str = Field(
        "=", description="the text between key and value; if empty, it is enough to look back by one word"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="texts run at once; does not change the score")
    cached: int | None = Field(None, ge=1, description=CACHED)


class KeyValueRecall(Task):
    """Texts of segments such as ``rule = path when given are to.``, followed by one of the keys again, ``rule =``.

    The model is right if, among all values in the text, the first token of the correct value has the highest logit.
    A model that was not trained on such texts succeeds as far as it can copy. For a model trained on ``documents`` of
    seeds other than 0, the task measures what its attention or its memory can retain.
    """

    id = "key_value_recall"
    summary = "recall a key's value from segments back, among all values of the text: what a memory retains"
    Options: ClassVar[type[TaskOptions]] = KeyValueRecallOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return writes_text(model)

    def evaluated(self) -> data.Data:
        texts = tuple((f"{text} {question} {answer}.",) for text, question, answer, _ in self._documents())
        return data.Data(self.id, "made up", texts)

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        right: list[float] = []
        skipped = 0
        asked: dict[int, list[tuple[list[int], list[int], int]]] = {}
        for text, question, answer, values in self._documents():
            ids = tokenizer(f"{text} {question}").input_ids
            firsts = [_first_token(tokenizer, f"{text} {question}", value) for value in values]
            if len(set(firsts)) < len(firsts):
                # One token cannot distinguish two values that begin with the same token.
                skipped += 1
                continue
            asked.setdefault(len(ids), []).append((ids, firsts, values.index(answer)))
        total = sum(map(len, asked.values()))
        if not total:
            raise TautError(
                f"task {self.id}: in every text two values begin with the same token; set fewer pairs for this model"
            )
        with torch.inference_mode():
            for rows in asked.values():
                for start in range(0, len(rows), self.options.batch_size):
                    batch = rows[start : start + self.options.batch_size]
                    last = logits(model, [ids for ids, _, _ in batch], self.options.cached)[:, -1]
                    for scores, (_, firsts, answer) in zip(last, batch, strict=True):
                        right.append(float(scores[firsts].argmax() == answer))
                    progress(len(right), total)
        options = self.options
        how = (
            f"{options.pairs} segments, {options.fillers} fillers in each; {skipped} texts skipped because two values "
        )
        how += "begin alike" + (f"; {options.cached} at a time through the cache" if options.cached else "")
        facts = self.evaluated().facts(total)
        return (self.score("accuracy", "share", how, right, "higher", facts, {"chance": 1 / self.options.pairs}),)

    def _documents(self) -> list[tuple[str, str, str, list[str]]]:
        return documents(self.options.limit, self.options.pairs, self.options.fillers, 0, self.options.between)


def documents(
    count: int, pairs: int, fillers: int, seed: int, between: str = "="
) -> list[tuple[str, str, str, list[str]]]:
    """``count`` tuples: the text of all segments, a question, its answer, and all values in the order of the text.

    The same seed gives the same texts.
    """
    draw = random.Random(seed)
    keys, values, others = words()
    texts = []
    for _ in range(count):
        chosen = list(zip(draw.sample(keys, pairs), draw.sample(values, pairs), strict=True))
        named = [[key, between] if between else [key] for key, _ in chosen]
        ends = [[value, *draw.choices(others, k=fillers)] for _, value in chosen]
        text = " ".join(" ".join(words) + "." for words in map(list.__add__, named, ends))
        asked = draw.randrange(pairs)
        texts.append((text, " ".join(named[asked]), chosen[asked][1], [value for _, value in chosen]))
    return texts


@cache
def words() -> tuple[list[str], list[str], list[str]]:
    """Keys, values and fillers: the most frequent words of three to eight letters in the built-in text."""
    counts = Counter(re.findall(r"\b[a-z]{3,8}\b", data.text("python_topics").rows[0][0]))
    ranked = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    # The most frequent words are the fillers; the next ones are keys and values in turn.
    rest = ranked[FILLERS : FILLERS + KEYS + VALUES]
    return rest[::2], rest[1::2], ranked[:FILLERS]


def _first_token(tokenizer: PreTrainedTokenizerBase, before: str, value: str) -> int:
    """The id of the first token of ``value`` when it follows ``before``."""
    plain = tokenizer(before, add_special_tokens=False).input_ids
    return tokenizer(f"{before} {value}", add_special_tokens=False).input_ids[len(plain)]

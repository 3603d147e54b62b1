"""Can a language model find a value again by its key, segments later?"""

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
from taut.core.record import Score
from taut.evaluation._language import CACHED, logits
from taut.evaluation.task import Progress, Task, TaskOptions, writes_text

KEYS, VALUES, FILLERS = 64, 64, 128
"""Words of each kind: frequent ones of the built-in text, none of two kinds."""


class KeyValueRecallOptions(TaskOptions):
    """Options of key_value_recall."""

    data: None = Field(None, description="not taken: the texts are made up")
    split: None = Field(None, description="not taken")
    limit: int = Field(200, ge=1, description="texts, one question each")
    pairs: int = Field(16, ge=2, le=KEYS, description="segments of a text, each with a key and its value")
    fillers: int = Field(5, ge=0, description="words after the value that mean nothing")
    between: str = Field(
        "=", description="what stands between key and value; empty: nothing, so that a look back of one word is enough"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="texts run at once; does not change the score")
    cached: int | None = Field(None, ge=1, description=CACHED)


class KeyValueRecall(Task):
    """Texts of segments such as ``rule = path when given are to.``; then one of the keys once more, ``rule =``. The
    model is right when, of all values in the text, it gives the first token of the right one the highest logit.

    A model that never saw such texts can do it as far as it copies; one trained on ``documents`` of seeds other than 0
    is asked what its attention, or its memory, can carry.
    """

    id = "key_value_recall"
    summary = "a key's value from segments back, chosen among the values of the text: what a memory carries"
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
                # Two values that begin alike cannot be told apart by one token.
                skipped += 1
                continue
            asked.setdefault(len(ids), []).append((ids, firsts, values.index(answer)))
        total = sum(map(len, asked.values()))
        if not total:
            raise TautError(
                f"task {self.id}: in every text two values begin with the same token: give this tokenizer fewer pairs"
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
        how = f"{options.pairs} segments, {options.fillers} fillers in each; {skipped} texts skipped, whose values "
        how += "begin alike" + (f"; {options.cached} at a time through the cache" if options.cached else "")
        facts = self.evaluated().facts(total)
        return (self.score("accuracy", "share", how, right, "higher", facts, {"chance": 1 / self.options.pairs}),)

    def _documents(self) -> list[tuple[str, str, str, list[str]]]:
        return documents(self.options.limit, self.options.pairs, self.options.fillers, 0, self.options.between)


def documents(
    count: int, pairs: int, fillers: int, seed: int, between: str = "="
) -> list[tuple[str, str, str, list[str]]]:
    """``count`` times: the text of all segments, a question, its answer, and all values in their order. The same seed
    gives the same texts."""
    draw = random.Random(seed)
    keys, values, others = words()
    found = []
    for _ in range(count):
        chosen = list(zip(draw.sample(keys, pairs), draw.sample(values, pairs), strict=True))
        named = [[key, between] if between else [key] for key, _ in chosen]
        ends = [[value, *draw.choices(others, k=fillers)] for _, value in chosen]
        text = " ".join(" ".join(words) + "." for words in map(list.__add__, named, ends))
        asked = draw.randrange(pairs)
        found.append((text, " ".join(named[asked]), chosen[asked][1], [value for _, value in chosen]))
    return found


@cache
def words() -> tuple[list[str], list[str], list[str]]:
    """Keys, values and fillers: the most frequent words of the built-in text with three to eight letters."""
    counts = Counter(re.findall(r"\b[a-z]{3,8}\b", data.text("python_topics").rows[0][0]))
    ranked = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    # The most frequent ones fill; keys and values take turns among the next.
    rest = ranked[FILLERS : FILLERS + KEYS + VALUES]
    return rest[::2], rest[1::2], ranked[:FILLERS]


def _first_token(tokenizer: PreTrainedTokenizerBase, before: str, value: str) -> int:
    """The id of the first token of ``value`` where it follows ``before``."""
    plain = tokenizer(before, add_special_tokens=False).input_ids
    return tokenizer(f"{before} {value}", add_special_tokens=False).input_ids[len(plain)]

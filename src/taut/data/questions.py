"""Multiple-choice questions from the files of several published data sets, in one form."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from taut.core.errors import TautError, nearest
from taut.data.files import Named, files_of, read
from taut.data.rows import Data, hashed

Question = tuple[str, ...]
"""A passage (may be empty), the question, the index of the correct choice (from 0), and all choices."""

QUESTIONS = {
    "openbookqa": Named({"train": "qa/openbookqa/train.json.gz"}),
    "arc_easy": Named({"train": "qa/ARC-Easy/train.json.gz"}),
    "arc_challenge": Named({"train": "qa/ARC-Challenge/train.json.gz"}),
    "piqa": Named({"dev": "qa/piqa/valid.jsonl"}),
    "boolq": Named({"all": "qa/boolq/boolq.jsonl.gz"}),
}


def questions(name: str, split: str | None = None) -> Data:
    """Rows of ``Question`` in hashed order, without duplicates.

    ``name``: one of ``QUESTIONS``, or a JSON file of objects with ``question``, ``choices``, ``answer`` (an index from
    0) and optionally ``passage``. Raises TautError if there is no such file, and for an object of another form.
    """
    if name.startswith("hub:"):
        raise TautError(f"data {name}: questions come from a file or a name: {nearest(name, QUESTIONS)}")
    files, source, split = files_of(name, split, QUESTIONS)
    rows = [row for path in files for row in _rows(path, name)]
    return Data(source, split, hashed(tuple(dict.fromkeys(rows))))


def _rows(path: Path, name: str) -> Iterator[Question]:
    form = FORMS.get(name, _plain)
    for number, item in enumerate(_items(path, name), 1):
        try:
            passage, question, right, choices = form(item)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TautError(f"data {path.name}: question {number}: {type(error).__name__}: {error}") from None
        if not (0 <= right < len(choices) and all(choice.strip() for choice in choices)):
            raise TautError(
                f"data {path.name}: question {number}: answer {right} of {len(choices)} choices; expected an index "
                "from 0 and no empty choice"
            )
        yield (passage, question, str(right), *choices)


Form = Callable[[dict[str, Any]], tuple[str, str, int, list[str]]]


def _items(path: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON file, or of a file with one object per line. PIQA keeps its labels in a second file."""
    content = read(path)
    try:
        whole = content.lstrip().startswith("[")
        items = json.loads(content) if whole else [json.loads(line) for line in content.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise TautError(f"data {path.name}: expected JSON objects: {error}") from None
    if name == "piqa":
        labels = read(path.with_name(f"{path.stem}-labels.lst")).split()
        if len(labels) != len(items):
            raise TautError(f"data {path.name}: {len(items)} questions, but {len(labels)} labels in the file beside it")
        items = [{**item, "label": label} for item, label in zip(items, labels, strict=True)]
    return items


def _plain(item: dict[str, Any]) -> tuple[str, str, int, list[str]]:
    return item.get("passage", ""), item["question"], int(item["answer"]), [str(choice) for choice in item["choices"]]


def _piqa(item: dict[str, Any]) -> tuple[str, str, int, list[str]]:
    return "", item["goal"], int(item["label"]), [item["sol1"], item["sol2"]]


def _boolq(item: dict[str, Any]) -> tuple[str, str, int, list[str]]:
    return item["passage"], item["question"], int(item["answer"]), ["no", "yes"]


def _instruction(item: dict[str, Any]) -> tuple[str, str, int, list[str]]:
    """Parse ``Please choose the correct answer to the question: ... Answer1: ... Answer2: ... Answer format: ...``."""
    form = r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: (\S+)\s*"
    match = re.fullmatch(form, item["instruction"], re.DOTALL)
    if not match:
        raise ValueError(f"not an instruction: {item['instruction'][:40]!r}")
    choices = [choice.strip() for choice in re.split(r"\sAnswer\d+: ", match[2])]
    if len(choices) != match[3].count("/") + 1:
        raise ValueError(f"{len(choices)} choices, but the format is {match[3]}")
    return "", match[1], int(item["answer"].removeprefix("answer")) - 1, choices


FORMS: dict[str, Form] = {
    "openbookqa": _instruction,
    "arc_easy": _instruction,
    "arc_challenge": _instruction,
    "piqa": _piqa,
    "boolq": _boolq,
}

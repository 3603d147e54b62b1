"""Text for training language models, and held-out text. No sentence is in both."""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from taut.core.errors import TautError
from taut.data import Data, calibration_texts, documents, paragraphs
from taut.training.spec import TrainSpec

BLANK = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and held-out documents to evaluate on. No sentence is in both."""

    learned: list[str]
    held: list[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\x00".join([*self.learned, "\x01", *self.held]).encode()).hexdigest()


def read_corpus(spec: TrainSpec) -> Corpus:
    """Read the text of a spec.

    The end of every document with enough paragraphs is held out, and the last ones of the short documents; or else the
    texts that ``evaluate.text`` names. Paragraphs that share a sentence with held-out text, with ``exclude`` or with
    the built-in evaluation text are not trained on. Raises TautError if nothing is left.
    """
    learned, held = [], []
    for name in spec.text:
        cut = _cut([row[0] for row in documents(name).rows], 0.0 if spec.evaluate.text else spec.evaluate.share)
        learned, held = learned + cut[0], held + cut[1]
    for name in spec.evaluate.text:
        held += [_Document.read(row[0]) for row in documents(name).rows]
    taken = [paragraphs("python_topics"), *(Data(name, "all", _rows(calibration_texts(name))) for name in spec.exclude)]
    taken.append(Data("held out", "all", _rows(piece for document in held for piece in document.pieces)))
    texts = [text for text in _without(learned, taken) if text.strip()]
    evaluated = [document.text for document in held if document.text.strip()]
    if not texts or not evaluated:
        what = "to train on without the evaluation's sentences" if evaluated else "to evaluate on: raise evaluate.share"
        raise TautError(f"text {', '.join(spec.text)}: nothing is left {what}")
    return Corpus(texts, evaluated)


def pieces_of(texts: Iterable[str]) -> list[str]:
    """The paragraphs of all texts. A text without blank lines is split into lines."""
    return [piece for text in texts for piece in _Document.read(text).pieces]


@dataclass(frozen=True)
class _Document:
    """A text as ``pieces``: paragraphs, or lines if no line is blank. ``glue`` is the text between them."""

    pieces: tuple[str, ...]
    glue: str

    @classmethod
    def read(cls, text: str) -> "_Document":
        blocks = tuple(piece for piece in BLANK.split(text) if piece.strip())
        if len(blocks) > 1:
            return cls(blocks, "\n\n")
        return cls(tuple(line for line in text.split("\n") if line.strip()), "\n")

    @property
    def text(self) -> str:
        return self.glue.join(self.pieces)


def _cut(texts: Sequence[str], share: float) -> tuple[list[_Document], list[_Document]]:
    """Split texts into documents to train on and documents to hold out."""
    if not share:
        return [_Document.read(text) for text in texts], []
    learned, held, short = [], [], []
    for document in map(_Document.read, texts):
        count = len(document.pieces)
        if count * share < 1:
            short.append(document)
            continue
        at = count - math.floor(count * share)
        learned.append(replace(document, pieces=document.pieces[:at]))
        held.append(replace(document, pieces=document.pieces[at:]))
    at = len(short) - math.floor(len(short) * share)
    return learned + short[:at], held + short[at:]


def _without(learned: Sequence[_Document], taken: Sequence[Data]) -> list[str]:
    """The texts without the pieces that share a sentence with ``taken``."""
    # The second column says where a piece belongs. As a single word it does not count as a sentence.
    rows = [
        (" ".join(piece.split()), f"{at}/{number}")
        for at, document in enumerate(learned)
        for number, piece in enumerate(document.pieces)
    ]
    kept = Data("learned", "all", tuple(rows))
    for data in taken:
        kept = kept.without(data)
    places = set(kept.column(1))
    texts = []
    for at, document in enumerate(learned):
        pieces = [piece for number, piece in enumerate(document.pieces) if f"{at}/{number}" in places]
        texts.append(replace(document, pieces=tuple(pieces)).text)
    return texts


def _rows(texts: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((" ".join(text.split()),) for text in texts)

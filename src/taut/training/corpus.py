"""Text to train language models on: what is learned from, what judges, and nothing in both."""

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
    """Documents to learn from and documents that judge; no sentence is in both."""

    learned: list[str]
    held: list[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\x00".join([*self.learned, "\x01", *self.held]).encode()).hexdigest()


def read_corpus(spec: TrainSpec) -> Corpus:
    """The text of a spec. Held out is the end of every document that has enough paragraphs, and the last ones of short
    documents; or what ``evaluate.text`` names. What shares a sentence with that, with ``exclude`` or with the built-in
    evaluation text is not learned from. Raises TautError where nothing is left."""
    learned, held = [], []
    for name in spec.text:
        cut = _cut([row[0] for row in documents(name).rows], 0.0 if spec.evaluate.text else spec.evaluate.share)
        learned, held = learned + cut[0], held + cut[1]
    for name in spec.evaluate.text:
        held += [_Document.read(row[0]) for row in documents(name).rows]
    taken = [paragraphs("python_topics"), *(Data(name, "all", _rows(calibration_texts(name))) for name in spec.exclude)]
    taken.append(Data("held out", "all", _rows(piece for document in held for piece in document.pieces)))
    texts = [text for text in _without(learned, taken) if text.strip()]
    judges = [document.text for document in held if document.text.strip()]
    if not texts or not judges:
        what = "to learn from once evaluation's sentences are taken out" if judges else "held out: raise evaluate.share"
        raise TautError(f"text {', '.join(spec.text)}: nothing is left {what}")
    return Corpus(texts, judges)


def pieces_of(texts: Iterable[str]) -> list[str]:
    """The paragraphs of all texts, or the lines of one where no line is blank."""
    return [piece for text in texts for piece in _Document.read(text).pieces]


@dataclass(frozen=True)
class _Document:
    """A text as ``pieces``: paragraphs, or lines where no line is blank. ``glue`` is what stands between them."""

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
    """What is learned from, and what is held out."""
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
    # A single word beside a piece is no sentence, so it can say where the piece belongs.
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
        own = [piece for number, piece in enumerate(document.pieces) if f"{at}/{number}" in places]
        texts.append(replace(document, pieces=tuple(own)).text)
    return texts


def _rows(texts: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((" ".join(text.split()),) for text in texts)

"""Reads running text, whole or by paragraphs, and texts for calibration, healing and training."""

import platform
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from taut.core.errors import TautError, nearest
from taut.data.builtin import BUILT_IN
from taut.data.files import NAMED, files_of, from_hub, read
from taut.data.rows import Data, blocks, hashed
from taut.data.tables import labelled, scored_pairs


def text(name: str, split: str | None = None, limit: int | None = None) -> Data:
    """Running text as one row of one cell, cut after ``limit`` characters. Raises TautError if there is none."""
    if name in BUILT_IN:
        if split not in (None, "all"):
            raise TautError(f"data {name}: unknown split {split!r}: {nearest(split, ['all'])}")
        return Data(f"{name} (Python {platform.python_version()})", "all", ((BUILT_IN[name]()[:limit],),))
    files, source, split = files_of(name, split)
    if files:
        whole = "".join(read(path) for path in files)
        return Data(source, split, ((whole[:limit],),))
    data = from_hub(source, split)
    return replace(data, rows=(("\n".join(row[0] for row in data.rows)[:limit],),))


def paragraphs(name: str, split: str | None = None, limit: int | None = None) -> Data:
    """The parts of a running text between blank lines, one per row, in order.

    Each run of whitespace becomes one space. If the text has only one part, each line is a paragraph. ``limit`` counts
    the characters of the text, as in ``text``.
    """
    data = text(name, split, limit)
    parts = blocks(data.rows[0][0])
    if len(parts) < 2:
        parts = [" ".join(line.split()) for line in data.rows[0][0].splitlines() if line.strip()]
    return replace(data, rows=tuple((block,) for block in parts))


def calibration_texts(source: str | Path, exclude: Iterable[Data] = ()) -> list[str]:
    """Texts for calibration and healing, none with a sentence of the built-in evaluation text or of ``exclude``.

    ``source``: ``builtin`` (500 paragraphs of Python's docstrings in hashed order, about 70,000 characters), a text
    file, or names with or without a split, joined by commas: ``wikitext2:train,sst2:train``. Running text gives its
    paragraphs in order, a table its texts in hashed order. Raises TautError if there is no text or none is left.
    """
    kept = _texts_of(source)
    if not kept.rows:
        raise TautError(f"calibration text {source}: it contains no text; give another source")
    for evaluated in (paragraphs("python_topics"), *exclude):
        kept = kept.without(evaluated)
    if not kept.rows:
        raise TautError(f"calibration text {source}: no text is left after removing the sentences of the evaluation")
    return kept.column(0)


def _texts_of(source: str | Path) -> Data:
    if str(source) == "builtin":
        return replace(Data("builtin", "all", ()), rows=hashed(paragraphs("python_docstrings").rows)[:500])
    if Path(source).is_file() or str(source).startswith("hub:"):
        return paragraphs(str(source))
    rows: list[tuple[str, ...]] = []
    for piece in str(source).split(","):
        name, _, split = piece.strip().partition(":")
        columns = NAMED[name].columns if name in NAMED else ()
        if len(columns) == 3:
            rows += [(cell,) for row in scored_pairs(name, split or None).rows for cell in row[:2]]
        elif columns:
            rows += [row[:1] for row in labelled(name, split or None).rows]
        else:
            rows += paragraphs(name, split or None).rows
    return Data(str(source), "all", tuple(dict.fromkeys(rows)))


def documents(source: str) -> Data:
    """Unchanged text for training from scratch: one row per file of running text, or per text of a table.

    ``source`` as for ``calibration_texts``, except that ``builtin`` is all of Python's docstrings. Raises TautError if
    there is none.
    """
    if Path(source).is_file() or source.startswith("hub:"):
        return text(source)
    name, _, split = source.strip().partition(":")
    if name == "builtin":
        return replace(text("python_docstrings"), source="builtin")
    if name in NAMED and NAMED[name].columns:
        return _texts_of(source)
    files = files_of(name, split or None)[0] if name not in BUILT_IN else []
    if not files:
        return text(name, split or None)
    return Data(source, split or "all", tuple((read(path),) for path in files))

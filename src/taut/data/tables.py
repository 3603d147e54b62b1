"""Reads tables of texts with a label or a score, from any kind of file."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from taut.core.errors import TautError, nearest
from taut.data.builtin import BUILT_IN
from taut.data.files import LABEL_HEADERS, NAMED, PAIR_HEADERS, SCORE_HEADERS, TEXT_HEADERS, files_of, from_hub, rows_of
from taut.data.rows import Data, hashed


def labelled(name: str, split: str | None = None, columns: str | None = None) -> Data:
    """Rows (text, label) in hashed order. ``columns``: ``"TEXT,LABEL"`` by header or by position from 0.

    Without ``columns``, a header with ``label`` and ``text`` or ``sentence`` decides. If there is no header and there
    are two columns, the label is the one with fewer distinct values. Raises TautError in any other case.
    """
    return _table(name, split, columns, 2, _guess_labelled, "TEXT,LABEL")


def scored_pairs(name: str, split: str | None = None, columns: str | None = None) -> Data:
    """Rows (sentence, sentence, score) in hashed order. ``columns`` as in ``labelled``, for three columns.

    Without ``columns``, a header decides. If there is no header and there are three columns, the score is the only one
    in which every value is a number. Raises TautError in any other case, and for a score that is not a number.
    """
    data = _table(name, split, columns, 3, _guess_scored, "SENTENCE1,SENTENCE2,SCORE")
    for row in data.rows:
        if not _is_number(row[2]):
            raise TautError(f"data {name}: the score {row[2]!r} of {row[0][:40]!r} is not a number")
    return data


Guess = Callable[[tuple[str, ...] | None, list[tuple[str, ...]]], tuple[int, ...] | None]


def _table(name: str, split: str | None, columns: str | None, count: int, guess: Guess, roles: str) -> Data:
    if name in BUILT_IN:
        raise TautError(f"data {name}: this is running text; expected a table {roles}: {nearest(name, NAMED)}")
    files, source, split = files_of(name, split)
    if not files:
        data = from_hub(source, split)
        if data.rows and len(data.rows[0]) != count:
            raise TautError(f"data {source}: expected the columns {roles}")
        return replace(data, rows=hashed(data.rows))
    wanted: Sequence[str | int] = NAMED[name].columns if name in NAMED else ()
    if columns is not None:
        wanted = [int(key) if key.isdigit() else key for key in (piece.strip() for piece in columns.split(","))]
    chosen: list[tuple[str, ...]] = []
    for path in files:
        header, rows = rows_of(path)
        indices = _indices(path, header, len(rows[0]) if rows else 0, wanted) if wanted else guess(header, rows)
        if indices is None or len(indices) != count:
            raise TautError(f"data {path.name}: cannot guess the columns; give columns as {roles}, such as 0,1")
        chosen += [tuple(row[index].strip() for index in indices) for row in rows]
    return Data(source, split, hashed(chosen))


def _indices(
    path: Path, header: tuple[str, ...] | None, width: int, wanted: Sequence[str | int]
) -> tuple[int, ...] | None:
    lowered = [cell.strip().lower() for cell in header or ()]
    for key in wanted:
        if isinstance(key, str) and key.lower() not in lowered:
            raise TautError(f"data {path.name}: no column {key!r}: {nearest(key, lowered)}")
        if isinstance(key, int) and key >= width:
            raise TautError(f"data {path.name}: no column {key}: {nearest(str(key), map(str, range(width)))}")
    return tuple(key if isinstance(key, int) else lowered.index(key.lower()) for key in wanted)


def _guess_labelled(header: tuple[str, ...] | None, rows: list[tuple[str, ...]]) -> tuple[int, ...] | None:
    if header:
        return _by_header(header, TEXT_HEADERS, LABEL_HEADERS)
    if not rows or len(rows[0]) != 2:
        return None
    return (1, 0) if len({row[0] for row in rows}) <= len({row[1] for row in rows}) else (0, 1)


def _guess_scored(header: tuple[str, ...] | None, rows: list[tuple[str, ...]]) -> tuple[int, ...] | None:
    if header:
        return _by_header(header, PAIR_HEADERS[:1], PAIR_HEADERS[1:], SCORE_HEADERS)
    if not rows or len(rows[0]) != 3:
        return None
    numeric = [index for index in range(3) if all(_is_number(row[index]) for row in rows)]
    return (*(index for index in range(3) if index != numeric[0]), numeric[0]) if len(numeric) == 1 else None


def _by_header(header: tuple[str, ...], *roles: tuple[str, ...]) -> tuple[int, ...] | None:
    lowered = [cell.strip().lower() for cell in header]
    indices = [next((lowered.index(choice) for choice in choices if choice in lowered), None) for choices in roles]
    return None if None in indices else tuple(indices)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*", cell) is not None

"""Finds the rows of a comparison that no other row of their size or less beats."""

from collections.abc import Sequence

from taut.studies.protocol import Row


def behind_front(rows: Sequence[Row], key: str, slot: str) -> list[float]:
    """How far each row's score ``key`` is behind the best row that stores at most as many bytes in ``slot``.

    The rows on the front have 0. Every row needs a value of the score and stored bytes.
    """
    sign = 1.0 if rows and rows[0].scores[key].better == "higher" else -1.0
    values = [sign * row.scores[key].value for row in rows]
    sizes = [row.bytes_per_slot[slot] for row in rows]
    return [
        max(other for other, stored in zip(values, sizes, strict=True) if stored <= size) - value
        for value, size in zip(values, sizes, strict=True)
    ]

"""From a budget to a recipe."""

from collections.abc import Sequence

from taut.core.errors import TautError, nearest
from taut.studies.protocol import Row


def pick(
    rows: Sequence[Row],
    *,
    score: str | None = None,
    cost: str = "stored_bytes",
    budget: float | None = None,
    max_loss: float | None = None,
) -> Row:
    """The best row within ``budget`` (of ``cost``), or the lightest one that loses at most ``max_loss``, or both.

    ``score`` is ``task metric`` (the first one when None). With both limits, the lightest row that keeps both. The
    loss counted is the worse end of its interval where there is one. Raises TautError when no row qualifies, naming
    the row that comes closest.
    """
    if budget is None and max_loss is None:
        raise TautError("nothing to pick by: give a budget, a max_loss, or both")
    done = [row for row in rows if row.records]
    keys = list(dict.fromkeys(key for row in done for key in row.scores))
    if not keys:
        raise TautError("nothing to pick from: no trial that ended has a score")
    if score is not None and score not in keys:
        raise TautError(f"unknown score {score!r}: {nearest(score, keys)}")
    key = score or keys[0]
    known = {
        id(row): row
        for row in done
        if key in row.scores and _cost(row, cost) is not None and loss(row, key) is not None
    }
    if not known:
        raise TautError(f"no trial has both {key!r} and {cost!r}, compared with a dense trial")
    fitting = [row for row in known.values() if budget is None or _cost(row, cost) <= budget]
    if not fitting:
        lightest = min(known.values(), key=lambda row: _cost(row, cost))
        raise TautError(
            f"no recipe within {budget:g} of {cost}; the lightest is {lightest.name}: {_cost(lightest, cost):g}"
        )
    if max_loss is None:
        return min(fitting, key=lambda row: (_rank(row, key), _cost(row, cost)))
    kept = [row for row in fitting if loss(row, key) <= max_loss]
    if not kept:
        closest = min(fitting, key=lambda row: loss(row, key))
        raise TautError(
            f"no recipe loses at most {max_loss:g} {key}; the closest is {closest.name}: {loss(closest, key):g}"
        )
    return min(kept, key=lambda row: (_cost(row, cost), loss(row, key)))


def loss(row: Row, key: str) -> float | None:
    """How much of a score was lost, at the worse end of its interval; 0 for dense; None when it was not compared."""
    if row.role == "dense":
        return 0.0
    cell = row.scores[key]
    if cell.gap is None:
        return None
    ends = [end for end in (cell.gap.value, cell.gap.low, cell.gap.high) if end is not None]
    return -min(ends) if cell.better == "higher" else max(ends)


def behind_front(rows: Sequence[Row], key: str, slot: str) -> list[float]:
    """For each row, how much more of score ``key`` the best row has that stores at most as many bytes in ``slot``;
    0 on the front. Every row needs a value of the score and stored bytes."""
    sign = 1.0 if rows and rows[0].scores[key].better == "higher" else -1.0
    values = [sign * row.scores[key].value for row in rows]
    sizes = [row.bytes_per_slot[slot] for row in rows]
    return [
        max(other for other, stored in zip(values, sizes, strict=True) if stored <= size) - value
        for value, size in zip(values, sizes, strict=True)
    ]


def _cost(row: Row, name: str) -> float | None:
    return row.costs[name].value if name in row.costs else None


def _rank(row: Row, key: str) -> float:
    cell = row.scores[key]
    return -cell.value if cell.better == "higher" else cell.value

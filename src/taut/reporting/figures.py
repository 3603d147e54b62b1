"""The charts of a report, as Vega-Lite: quality against size and time, bytes per slot, differences to dense."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from taut.core.errors import TautError
from taut.reporting.scatter import Axis, logarithmic, palette, scatter, symmetric
from taut.studies import words
from taut.studies.protocol import Row, score_keys
from taut.studies.selection import behind_front

BARS = 400
"""Width of bar charts in pixels, without the names beside the bars."""
FAMILY_COLORS = {
    "dense": "#8a8f98",
    "identity": "#b9bdc5",
    "embedding": "#2f7ed8",
    "linear maps": "#e8871e",
    "attention": "#17a589",
    "memory": "#9b59d0",
    "combination": "#d6336c",
}
SLOT_COLORS = {
    "embedding": "#2f7ed8",
    "projection": "#f2b134",
    "feed-forward": "#e8871e",
    "attention": "#17a589",
    "memory": "#9b59d0",
    "other": "#a7abb3",
}
VERDICT_COLORS = {
    "better": "#17a589",
    "worse": "#e5484d",
    "within noise": "#8a8f98",
    "same": "#8a8f98",
    "no interval": "#d9a514",
}
METHOD_COLORS = ("#2f7ed8", "#e8871e", "#17a589", "#d6336c", "#9b59d0", "#6b8e23", "#00a3c7", "#b5651d", "#f2b134")
METHOD_COLORS += ("#5c6bc0", "#c2185b", "#455a64")


@dataclass(frozen=True)
class Figure:
    """One chart. ``score`` is None if the chart does not depend on a score."""

    kind: str
    title: str
    caption: str
    model: str
    score: str | None
    chart: alt.TopLevelMixin

    def spec(self) -> dict[str, Any]:
        """The chart as Vega-Lite, data included."""
        return self.chart.to_dict()

    @property
    def file_name(self) -> str:
        text = "-".join(part for part in (self.kind, self.model, self.score) if part)
        return re.sub(r"[^A-Za-z0-9@.]+", "-", text).strip("-.") + ".png"


def draw(rows: Sequence[Row]) -> list[Figure]:
    """All charts for which there is data, model by model and score by score."""
    figures: list[Figure] = []
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model and row.records]
        for key in score_keys(of_model):
            scored = [row for row in of_model if key in row.scores and row.scores[key].value is not None]
            figures += _against_size(scored, model, key)
            figures += _against_slot(scored, model, key)
            figures += _against_time(scored, model, key)
            figures += _differences(scored, model, key)
        figures += _bytes_per_slot(of_model, model)
    return figures


def save(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Save every chart as a PNG in ``folder``. Raises TautError if it cannot be written."""
    folder = Path(folder)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in draw(rows):
            spec = figure.spec() | {"config": config(dark=False), "title": figure.title}
            paths.append(folder / figure.file_name)
            paths[-1].write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
    except OSError as error:
        raise TautError(f"{folder}: cannot write the figures: {error.strerror or error}") from None
    return paths


def config(dark: bool) -> dict[str, Any]:
    """The Vega-Lite configuration for the light or the dark page."""
    ink, soft, line = ("#e6e8ec", "#9aa1ad", "#2b3038") if dark else ("#1b1f27", "#5c6370", "#e6e8ec")
    font = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
    axis = {"labelColor": soft, "titleColor": soft, "gridColor": line, "domainColor": line, "tickColor": line}
    return {
        "background": "transparent" if dark else "white",
        "font": font,
        "axis": axis | {"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12, "labelLimit": 260},
        "legend": {"labelColor": soft, "titleColor": soft, "labelFontSize": 11, "orient": "bottom", "symbolOpacity": 1},
        "title": {"color": ink, "anchor": "start", "fontSize": 14},
        "text": {"color": ink},
        "rule": {"color": soft},
        "view": {"stroke": None},
    }


def _against_size(rows: Sequence[Row], model: str, key: str) -> Iterator[Figure]:
    sized = [row for row in rows if "stored_bytes" in row.costs and row.costs["stored_bytes"].value is not None]
    if len(sized) < 2:
        return
    points = [_point(row, key) | {"x": row.costs["stored_bytes"].value / 1e6} for row in sized]
    caption = (
        "Whiskers: 95 % interval of the difference to dense. "
        "Stepped line: the front, the recipes that no other recipe beats in both size and quality."
    )
    chart = scatter(points, Axis("stored size (MB)"), Axis(key), rows[0].scores[key], FAMILY_COLORS)
    yield Figure("size", "Quality against stored size", caption, model, key, chart)


def _against_slot(rows: Sequence[Row], model: str, key: str) -> Iterator[Figure]:
    """Quality against the bytes of a slot, method by method.

    One chart for each slot for which there are recipes that change only this slot, with three or more methods.
    """
    dense = next((row for row in rows if row.role == "dense"), None)
    for slot, label in words.SLOT_LABELS.items():
        alone = [row for row in rows if words.slots_of(row) == [slot] and row.bytes_per_slot.get(slot)]
        methods = sorted({words.method(row, slot) for row in alone})
        if dense is None or len(methods) < 3 or any(row.scores[key].gap is None for row in alone):
            continue
        points = []
        for row, behind in zip(alone, behind_front(alone, key, slot), strict=True):
            gap, share = row.scores[key].gap, row.bytes_per_slot[slot] / dense.bytes_per_slot[slot]
            points.append(
                _point(row, key)
                | {"family": words.method(row, slot), "x": row.bytes_per_slot[slot] / 1e6, "score": gap.value}
                | {"low": gap.value if gap.low is None else gap.low}
                | {"high": gap.value if gap.high is None else gap.high}
                | {"size": f"{row.bytes_per_slot[slot] / 1e6:.3g} MB, {1 / share:.3g}x smaller"}
                | {"healed": "healed" if row.heal else "as fitted"}
                | {"behind": "on the front" if behind == 0 else f"{behind:.4f} behind the front"}
            )
        colors = dict(zip(methods, itertools.cycle(METHOD_COLORS)))
        axes = logarithmic(f"stored size of the {label} (MB)"), symmetric(f"change of {key}")
        chart = scatter(points, *axes, rows[0].scores[key], colors)
        caption = (
            f"Recipes that change only the {label} (dense: {dense.bytes_per_slot[slot] / 1e6:.3g} MB). Both axes are "
            "logarithmic. Stepped line: the front, the recipes that no other recipe beats in both size and quality."
        )
        yield Figure(f"{slot}-front", f"Quality against the size of the {label}", caption, model, key, chart)


def _against_time(rows: Sequence[Row], model: str, key: str) -> Iterator[Figure]:
    for name, noun in (("latency_prefill", "prefill"), ("latency_decode", "decode")):
        points = []
        for row in rows:
            gap = row.costs[name].gap if name in row.costs else None
            if row.role == "dense":
                points.append(_point(row, key) | {"x": 1.0, "x_low": 1.0, "x_high": 1.0})
            elif gap is not None:
                ends = {
                    "x_low": gap.value if gap.low is None else gap.low,
                    "x_high": gap.value if gap.high is None else gap.high,
                }
                points.append(_point(row, key) | {"x": gap.value, "time": words.gap(gap, ("faster", "slower"))} | ends)
        if len(points) > 1:
            x_axis = Axis(f"{noun} time relative to dense (left of 1 is faster)")
            chart = scatter(points, x_axis, Axis(key), rows[0].scores[key], FAMILY_COLORS)
            caption = f"Time of {noun} relative to dense, both timed in turn in one run. Whiskers: 95 % intervals."
            yield Figure(noun, f"Quality against {noun} time", caption, model, key, chart)


def _differences(rows: Sequence[Row], model: str, key: str) -> Iterator[Figure]:
    gaps = [(row, row.scores[key].gap) for row in rows if row.scores[key].gap is not None]
    if not gaps:
        return
    points = [
        {
            "recipe": row.recipe_name,
            "change": gap.value,
            "low": gap.value if gap.low is None else gap.low,
            "high": gap.value if gap.high is None else gap.high,
            "verdict": gap.word or "no interval",
            "interval": words.interval(gap),
        }
        for row, gap in gaps
    ]
    order = [row.recipe_name for row, _ in gaps]
    colors = palette("verdict", VERDICT_COLORS, points)
    base = alt.Chart(alt.Data(values=points)).encode(
        y=alt.Y("recipe:N", sort=order, title=None),
        tooltip=[alt.Tooltip("recipe:N"), alt.Tooltip("change:Q", format="+.4f"), "interval:N", "verdict:N"],
    )
    chart = alt.layer(
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
        base.mark_rule(strokeWidth=2.5).encode(x=alt.X("low:Q", title=f"change of {key}"), x2="high:Q", color=colors),
        base.mark_point(filled=True, size=80, opacity=1).encode(x="change:Q", color=colors),
    ).properties(width=BARS, height=max(80, 24 * len(points)))
    caption = "Compared item by item on the same data. An interval that crosses the dashed line is within noise."
    yield Figure("difference", "Difference to dense", caption, model, key, chart)


def _bytes_per_slot(rows: Sequence[Row], model: str) -> Iterator[Figure]:
    sized = [row for row in rows if row.bytes_per_slot]
    if not sized:
        return
    names = list(SLOT_COLORS)
    points = [
        {"recipe": row.recipe_name, "slot": label, "order": names.index(label), "megabytes": size / 1e6}
        for row in sized
        for slot, size in row.bytes_per_slot.items()
        if (label := words.SLOT_LABELS.get(slot, "other")) and size
    ]
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_bar(height={"band": 0.72})
        .encode(
            y=alt.Y("recipe:N", sort=[row.recipe_name for row in sized], title=None),
            x=alt.X("sum(megabytes):Q", title="stored MB"),
            color=palette("slot", SLOT_COLORS, points),
            order=alt.Order("order:Q"),
            tooltip=["recipe:N", "slot:N", alt.Tooltip("sum(megabytes):Q", title="MB", format=".2f")],
        )
        .properties(width=BARS, height=max(80, 24 * len(sized)))
    )
    yield Figure("slots", "Size of each slot", "Stored bytes; tied tensors are counted once.", model, None, chart)


def _point(row: Row, key: str) -> dict[str, Any]:
    cell = row.scores[key]
    low, high = cell.value, cell.value
    if cell.gap is not None and cell.gap.low is not None and cell.gap.high is not None:
        dense = cell.value - cell.gap.value
        low, high = dense + cell.gap.low, dense + cell.gap.high
    size = row.costs.get("stored_bytes")
    return {
        "recipe": row.recipe_name,
        "family": words.family(row),
        "score": cell.value,
        "low": low,
        "high": high,
        "change": words.gap(cell.gap) or "baseline",
        "size": words.value(size) if size else "n/a",
    }

"""The pictures of a report, as Vega-Lite: quality against size and time, bytes per slot, differences to dense."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from taut.comparison.protocol import Cell, Row, score_keys
from taut.comparison.statistics import pareto_front
from taut.core.errors import TautError
from taut.reporting import words

WIDTH, HEIGHT, BARS = 560, 340, 400
"""Pixels: of a scatter plot, and the width of bars, which have names beside them."""
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
LETTER = 6.2
"""Width of a letter of a label in pixels, for keeping labels apart."""


@dataclass(frozen=True)
class Figure:
    """One chart. ``score`` is None where the chart does not depend on one."""

    kind: str
    title: str
    caption: str
    model: str
    score: str | None
    chart: alt.TopLevelMixin

    def spec(self) -> dict[str, Any]:
        """Vega-Lite with its data inside."""
        return self.chart.to_dict()

    @property
    def file_name(self) -> str:
        text = "-".join(part for part in (self.kind, self.model, self.score) if part)
        return re.sub(r"[^A-Za-z0-9@.]+", "-", text).strip("-.") + ".png"


def draw(rows: Sequence[Row]) -> list[Figure]:
    """All charts there is data for, model by model and score by score."""
    found: list[Figure] = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model and row.records]
        for key in score_keys(mine):
            scored = [row for row in mine if key in row.scores and row.scores[key].value is not None]
            found += _against_size(scored, model, key)
            found += _against_time(scored, model, key)
            found += _differences(scored, model, key)
        found += _bytes_per_slot(mine, model)
    return found


def save(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Every chart as a PNG in ``folder``. Raises TautError when it cannot be written."""
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
    """The Vega-Lite config of the light or the dark page."""
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
        "Steps: the front, where nothing else is both smaller and better."
    )
    chart = _scatter(points, "stored size (MB)", key, rows[0].scores[key])
    yield Figure("size", "Quality against stored size", caption, model, key, chart)


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
            chart = _scatter(points, f"{noun} time relative to dense (left of 1 is faster)", key, rows[0].scores[key])
            caption = f"Time of a {noun} step over dense, both taking turns in one run. Whiskers: 95 % intervals."
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
    colors = _color("verdict", VERDICT_COLORS, points)
    base = alt.Chart(alt.Data(values=points)).encode(
        y=alt.Y("recipe:N", sort=order, title=None),
        tooltip=[alt.Tooltip("recipe:N"), alt.Tooltip("change:Q", format="+.4f"), "interval:N", "verdict:N"],
    )
    chart = alt.layer(
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"),
        base.mark_rule(strokeWidth=2.5).encode(x=alt.X("low:Q", title=f"change of {key}"), x2="high:Q", color=colors),
        base.mark_point(filled=True, size=80, opacity=1).encode(x="change:Q", color=colors),
    ).properties(width=BARS, height=max(80, 24 * len(points)))
    caption = "Item by item on the same data. An interval that crosses the dashed line is within noise."
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
            color=_color("slot", SLOT_COLORS, points),
            order=alt.Order("order:Q"),
            tooltip=["recipe:N", "slot:N", alt.Tooltip("sum(megabytes):Q", title="MB", format=".2f")],
        )
        .properties(width=BARS, height=max(80, 24 * len(sized)))
    )
    yield Figure("slots", "Where the bytes are", "Stored bytes by slot; ties are counted once.", model, None, chart)


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


def _scatter(points: list[dict[str, Any]], x_title: str, key: str, cell: Cell) -> alt.LayerChart:
    """Points with whiskers, the Pareto front as steps, shortcut baselines as dotted lines, labels where they fit."""
    x_domain = _domain(
        [end for point in points for end in (point.get("x_low", point["x"]), point.get("x_high", point["x"]))]
    )
    reach = _domain([point[end] for point in points for end in ("low", "high")])
    shortcuts = [
        {"baseline": name, "score": value}
        for name, value in (cell.sources[0].score.baselines if cell.sources[0].score else {}).items()
        if reach[0] - 0.4 * (reach[1] - reach[0]) <= value <= reach[1] + 0.4 * (reach[1] - reach[0])
    ]
    y_domain = _domain([*reach, *(line["score"] for line in shortcuts)], margin=0.0)
    front = pareto_front([(point["x"], point["score"]) for point in points], (True, cell.better == "lower"))
    _place_labels(points, x_domain, y_domain, set(front))
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(domain=x_domain, nice=False, zero=False))
    scale = alt.Scale(domain=y_domain, nice=False, zero=False)
    y = alt.Y("score:Q", title=key, scale=scale)
    color = _color("family", FAMILY_COLORS, points)
    base = alt.Chart(alt.Data(values=points))
    steps = sorted(
        ({"x": points[index]["x"], "score": points[index]["score"]} for index in front), key=lambda step: step["x"]
    )
    tooltip = [alt.Tooltip("recipe:N"), alt.Tooltip("score:Q", title=key, format=".4f"), "change:N", "size:N"]
    layers = [
        alt.Chart(alt.Data(values=steps))
        .mark_line(interpolate="step-after", strokeWidth=1.5, opacity=0.55, color="#8a8f98")
        .encode(x=x, y=y),
        base.mark_rule(opacity=0.55).encode(x=x, y=alt.Y("low:Q", title=key, scale=scale), y2="high:Q", color=color),
        base.mark_point(filled=True, size=95, opacity=1).encode(
            x=x, y=y, color=color, tooltip=tooltip + (["time:N"] if "x_low" in points[0] else [])
        ),
    ]
    if "x_low" in points[0]:
        layers.insert(
            1, base.mark_rule(opacity=0.55).encode(x=alt.X("x_low:Q", title=x_title), x2="x_high:Q", y=y, color=color)
        )
        layers.insert(0, alt.Chart(alt.Data(values=[{"x": 1.0}])).mark_rule(strokeDash=[4, 3], opacity=0.6).encode(x=x))
    if shortcuts:
        lines = alt.Chart(alt.Data(values=shortcuts))
        layers.append(lines.mark_rule(strokeDash=[2, 3], opacity=0.8).encode(y=y))
        layers.append(
            lines.mark_text(align="left", baseline="bottom", fontSize=10, dx=3, dy=-2).encode(
                x=alt.value(0), y=y, text="baseline:N"
            )
        )
    for align, dx, dy in PLACES:
        here = [point for point in points if point.get("place") == PLACES.index((align, dx, dy))]
        if here:
            text = alt.Chart(alt.Data(values=here)).mark_text(align=align, dx=dx, dy=dy, fontSize=11)
            layers.append(text.encode(x=x, y=y, text="recipe:N"))
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)


PLACES = (
    ("left", 9, 0),
    ("right", -9, 0),
    ("center", 0, -13),
    ("center", 0, 14),
    ("left", 8, -11),
    ("left", 8, 12),
    ("right", -8, -11),
    ("right", -8, 12),
)
"""Where a label may stand beside its point: alignment and pixels right and down, in order of preference."""


def _place_labels(points: list[dict[str, Any]], x_domain: list[float], y_domain: list[float], first: set[int]) -> None:
    """Give each point a ``place`` where its label covers no point and no label; the Pareto front chooses first."""

    def at(point: dict[str, Any]) -> tuple[float, float]:
        across = (point["x"] - x_domain[0]) / (x_domain[1] - x_domain[0]) * WIDTH
        return across, HEIGHT - (point["score"] - y_domain[0]) / (y_domain[1] - y_domain[0]) * HEIGHT

    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in map(at, points)]
    for index in sorted(range(len(points)), key=lambda index: (index not in first, points[index]["x"])):
        (x, y), width = at(points[index]), LETTER * len(points[index]["recipe"])
        for place, (align, dx, dy) in enumerate(PLACES):
            left = x + dx - {"left": 0.0, "center": width / 2, "right": width}[align]
            box = (left, y + dy - 6, left + width, y + dy + 6)
            inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                points[index]["place"] = place
                taken.append(box)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _domain(values: list[float], margin: float = 0.07) -> list[float]:
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) or 1.0
    return [low - margin * reach, high + margin * reach]


def _color(field: str, colors: dict[str, str], points: list[dict[str, Any]]) -> alt.Color:
    """Colours that mean the same in every chart, with only those present in the legend."""
    present = {point[field] for point in points}
    shown = [name for name in colors if name in present]
    scale = alt.Scale(domain=shown, range=[colors[name] for name in shown])
    return alt.Color(f"{field}:N", scale=scale, sort=shown, legend=alt.Legend(title=None))

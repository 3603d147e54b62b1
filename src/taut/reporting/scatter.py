"""A scatter plot of quality against a cost: whiskers, the Pareto front as steps, labels where there is room."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import altair as alt

from taut.studies.protocol import Cell
from taut.studies.statistics import pareto_front

WIDTH, HEIGHT = 560, 340
"""Pixels."""
LETTER = 6.2
"""Width of one letter of a label in pixels, for keeping labels apart."""
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
"""Possible positions of a label: alignment, and pixels to the right and down from its point, in order of preference."""
SMALL_CHANGE = 0.002
"""Below this value, a symmetric logarithmic axis is nearly linear."""
LEGEND_COLUMNS = 5
"""With more, the legend would be wider than the chart."""
SHAPES = {"as fitted": "circle", "healed": "triangle-up"}


@dataclass(frozen=True)
class Axis:
    """Maps numbers to positions. ``forward`` is the map of a Vega scale with these ``options``, up to a linear map."""

    title: str
    forward: Callable[[float], float] = float
    backward: Callable[[float], float] = float
    options: tuple[tuple[str, Any], ...] = ()

    def domain(self, values: list[float], margin: float = 0.07) -> list[float]:
        """The minimum and maximum of the axis: those of ``values`` and a margin, a share of the drawn length."""
        low, high = self.forward(min(values)), self.forward(max(values))
        reach = (high - low) or abs(high) or 1.0
        return [self.backward(low - margin * reach), self.backward(high + margin * reach)]

    def scale(self, domain: list[float]) -> alt.Scale:
        return alt.Scale(domain=domain, nice=False, **({"zero": False} | dict(self.options)))

    def share(self, value: float, domain: list[float]) -> float:
        """The position of a value: 0 at the start of the axis, 1 at its end."""
        low, high = map(self.forward, domain)
        return (self.forward(value) - low) / (high - low)


def logarithmic(title: str) -> Axis:
    return Axis(title, math.log, math.exp, (("type", "log"), ("zero", alt.Undefined)))


def symmetric(title: str) -> Axis:
    """An axis that is logarithmic on both sides of zero: small losses remain distinct beside very large ones."""
    return Axis(
        title,
        lambda value: math.copysign(math.log1p(abs(value) / SMALL_CHANGE), value),
        lambda place: math.copysign(math.expm1(abs(place)) * SMALL_CHANGE, place),
        (("type", "symlog"), ("constant", SMALL_CHANGE), ("zero", alt.Undefined)),
    )


def scatter(points: list[dict[str, Any]], x_axis: Axis, y_axis: Axis, cell: Cell, colors: dict[str, str]) -> Any:
    """The chart of ``points``.

    A point has recipe, family, x, score, low, high, change, size, and optionally x_low, x_high, time, healed, behind.
    ``cell`` gives the shortcut baselines, and whether higher or lower is better.
    """
    x_domain = x_axis.domain([end for point in points for end in _reach(point)])
    reach = y_axis.domain([point[end] for point in points for end in ("low", "high")])
    shortcuts = []
    if y_axis.forward is float and cell.sources[0].score:
        room = 0.4 * (reach[1] - reach[0])
        shortcuts = [
            {"baseline": name, "score": value}
            for name, value in cell.sources[0].score.baselines.items()
            if reach[0] - room <= value <= reach[1] + room
        ]
    y_domain = y_axis.domain([*reach, *(line["score"] for line in shortcuts)], margin=0.0)
    front = pareto_front([(point["x"], point["score"]) for point in points], (True, cell.better == "lower"))
    _place_labels(points, lambda one: x_axis.share(one, x_domain), lambda one: y_axis.share(one, y_domain), set(front))
    x = alt.X("x:Q", title=x_axis.title, scale=x_axis.scale(x_domain))
    scale = y_axis.scale(y_domain)
    y = alt.Y("score:Q", title=y_axis.title, scale=scale)
    color = palette("family", colors, points)
    base = alt.Chart(alt.Data(values=points))
    steps = sorted(
        ({"x": points[index]["x"], "score": points[index]["score"]} for index in front), key=lambda step: step["x"]
    )
    extra = {"x_low": ["time:N"], "behind": ["behind:N"]}
    tooltip = [alt.Tooltip("recipe:N"), alt.Tooltip("score:Q", title=y_axis.title, format=".4f"), "change:N", "size:N"]
    tooltip += [field for key, fields in extra.items() if key in points[0] for field in fields]
    shape = {}
    if len({point.get("healed") for point in points}) > 1:
        shape["shape"] = alt.Shape(
            "healed:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())), legend=alt.Legend(title=None)
        )
    layers = [
        alt.Chart(alt.Data(values=steps))
        .mark_line(interpolate="step-after", strokeWidth=1.5, opacity=0.55, color="#8a8f98")
        .encode(x=x, y=y),
        base.mark_rule(opacity=0.55).encode(
            x=x, y=alt.Y("low:Q", title=y_axis.title, scale=scale), y2="high:Q", color=color
        ),
        base.mark_point(filled=True, size=95, opacity=1).encode(x=x, y=y, color=color, tooltip=tooltip, **shape),
    ]
    if "x_low" in points[0]:
        layers.insert(
            1,
            base.mark_rule(opacity=0.55).encode(
                x=alt.X("x_low:Q", title=x_axis.title), x2="x_high:Q", y=y, color=color
            ),
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


def palette(field: str, colors: dict[str, str], points: list[dict[str, Any]]) -> alt.Color:
    """Colours with the same meaning in every chart; the legend shows only those in use."""
    present = {point[field] for point in points}
    shown = [name for name in colors if name in present]
    scale = alt.Scale(domain=shown, range=[colors[name] for name in shown])
    return alt.Color(f"{field}:N", scale=scale, sort=shown, legend=alt.Legend(title=None, columns=LEGEND_COLUMNS))


def _reach(point: dict[str, Any]) -> tuple[float, float]:
    return point.get("x_low", point["x"]), point.get("x_high", point["x"])


def _place_labels(
    points: list[dict[str, Any]], across: Callable[[float], float], up: Callable[[float], float], first: set[int]
) -> None:
    """Set a ``place`` for each point where its label covers no point and no other label.

    Points on the Pareto front come first. A point without a free place gets no label.
    """
    places = [(across(point["x"]) * WIDTH, HEIGHT - up(point["score"]) * HEIGHT) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for index in sorted(range(len(points)), key=lambda index: (index not in first, points[index]["x"])):
        (x, y), width = places[index], LETTER * len(points[index]["recipe"])
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

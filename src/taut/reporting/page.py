"""Draws one self-contained HTML page from a ledger: it opens offline and loads nothing."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import vl_convert
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from taut.core.errors import TautError
from taut.core.record import Record
from taut.reporting.figures import FAMILY_COLORS, config, draw
from taut.reporting.figures import save as save_figures
from taut.reporting.highlights import highlights
from taut.studies import words
from taut.studies.comparison import Comparison
from taut.studies.ledger import Ledger
from taut.studies.protocol import COSTS, RATIOS, Cell, Row, cost_keys, score_keys, summary

MAIN_COSTS = (
    "stored_bytes",
    "latency_prefill",
    "latency_decode",
    "peak_bytes",
    "flops_per_token",
    "cache_bytes_per_token",
    "energy_joules",
)
"""The columns shown at first; a button shows the others."""

SAMPLES_SHOWN = 600
"""The page contains at most this many raw samples per source of a cell; the record has all of them."""


def write(
    ledger: Ledger | str | Path,
    out: str | Path | None,
    figures: str | Path | None = None,
    csv: str | Path | None = None,
    title: str | None = None,
) -> Path | None:
    """Draw the report of a whole ledger: the page ``out``, PNG files in the folder ``figures``, the numbers in ``csv``.

    Each is written if it is given. Raises TautError if the ledger is empty or a file cannot be written.
    """
    ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    ledger.check_not_empty()
    records, damaged = ledger.records(), ledger.damaged()
    rows = Comparison(summary(records))
    if figures is not None:
        save_figures(rows, figures)
    if csv is not None:
        _write_whole(Path(csv), rows.csv())
    if out is None:
        return None
    return _write_whole(Path(out), page(records, [(str(path), reason) for path, reason in damaged], title, rows))


def _write_whole(path: Path, text: str) -> Path:
    """Write the file whole or not at all. Raises TautError if it cannot be written."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8", newline="\n")
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise TautError(f"{path}: cannot write the report: {error.strerror or error}") from None
    return path


def page(
    records: Sequence[Record],
    damaged: Sequence[tuple[str, str]] = (),
    title: str | None = None,
    rows: Sequence[Row] | None = None,
) -> str:
    """The HTML of a report. All content from records is escaped, in markup and in scripts.

    ``rows`` is the summary of the records if it is there already.
    """
    rows = summary(records) if rows is None else rows
    cells = _Cells()
    drawn = draw(rows)
    scores, costs = score_keys(rows), [name for name in cost_keys(rows) if name not in RATIOS]
    templates = Environment(
        loader=PackageLoader("taut.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source, _, _ = templates.loader.get_source(templates, "page.css")
    script, _, _ = templates.loader.get_source(templates, "page.js")
    models = list(dict.fromkeys(row.model for row in rows))
    studies = list(dict.fromkeys(record.study for record in records))
    return templates.get_template("page.html.jinja").render(
        title=title or " · ".join(studies) or "taut report",
        drawn=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        models=models,
        scores=scores,
        score_help={key: _score_help(rows, key) for key in scores},
        costs=[
            (name, words.label(name), COSTS[name].help if name in COSTS else "", name in MAIN_COSTS) for name in costs
        ],
        rows=[_row(index, scores, costs, cells, rows) for index in range(len(rows))],
        highlights=[card for model in models for card in highlights([row for row in rows if row.model == model])],
        failures=[(row, record) for row in rows for record in row.failures],
        damaged=damaged,
        superseded=sum(row.superseded for row in rows),
        environments=_environments(records),
        counts={
            "trials": len(records),
            "done": sum(record.status == "done" for record in records),
            "failed": sum(record.status == "failed" for record in records),
            "damaged": len(damaged),
        },
        figures=drawn,
        data=_for_script(
            {
                "cells": cells.details,
                "charts": [
                    {
                        "kind": figure.kind,
                        "title": figure.title,
                        "caption": figure.caption,
                        "model": figure.model,
                        "score": figure.score,
                        "spec": figure.spec(),
                    }
                    for figure in drawn
                ],
                "themes": {"light": config(False) | {"background": "transparent"}, "dark": config(True)},
                "details": [_details(row) for row in rows],
            }
        ),
        style=Markup(source),
        script=Markup(script),
        vega=Markup(_bundle() if drawn else ""),
    )


class _Cells:
    """Collects the provenance of the cells while the table is drawn. ``add`` returns a cell's index in the list."""

    def __init__(self) -> None:
        self.details: list[dict[str, Any]] = []

    def add(self, heading: str, cell: Cell) -> int:
        self.details.append({"heading": heading, "value": words.value(cell), "how": cell.how, "facts": _facts(cell)})
        self.details[-1]["sources"] = [
            {
                "record": source.record.id,
                "seed": source.record.seed,
                "facts": _source_facts(source),
                "samples": source.quantity.samples[:SAMPLES_SHOWN],
                "count": len(source.quantity.samples),
            }
            for source in cell.sources
        ]
        return len(self.details) - 1


def _row(index: int, scores: list[str], costs: list[str], cells: _Cells, rows: Sequence[Row]) -> dict[str, Any]:
    row = rows[index]
    heading = f"{row.name} · "
    largest = {"stored_bytes": max(_values(rows, row.model, "stored_bytes"), default=0.0)}
    shown = []
    for key, cell, names in [(key, row.scores.get(key), None) for key in scores] + [
        (name, row.costs.get(name), COSTS[name].words if name in COSTS else None) for name in costs
    ]:
        if cell is None:
            shown.append({"text": "n/a", "sort": "", "index": None, "key": key, "title": "not part of this trial"})
            continue
        share = cell.value / largest[key] if key in largest and cell.value and largest[key] else None
        shown.append(
            {
                "key": key,
                "text": words.value(cell),
                "sort": _order(key, cell, row),
                "index": cells.add(heading + (words.label(key) if key in costs else key), cell),
                "title": cell.how if cell.value is None else "where this number comes from",
                "gap": words.gap(cell.gap, names),
                "verdict": words.verdict(cell.gap),
                "share": share,
            }
        )
    return {
        "row": row,
        "index": index,
        "family": words.family(row),
        "color": FAMILY_COLORS[words.family(row)],
        "line": words.recipe_line(row.recipe)
        if row.role != "identity"
        else "every part replaced by itself: the error bar",
        "cells": shown,
    }


def _order(key: str, cell: Cell, row: Row) -> str:
    """The sort key of a cell: its value, or for times the ratio, because trials ran at different times."""
    if cell.value is None or key not in COSTS or COSTS[key].ratio is None:
        return "" if cell.value is None else repr(cell.value)
    return "1.0" if row.role == "dense" else repr(cell.gap.value) if cell.gap else ""


def _values(rows: Sequence[Row], model: str, name: str) -> list[float]:
    measured = (row.costs[name].value for row in rows if row.model == model and name in row.costs)
    return [value for value in measured if value is not None]


def _facts(cell: Cell) -> list[tuple[str, str]]:
    facts = [("interval", words.interval(cell))]
    if cell.gap is not None:
        gap = cell.gap
        facts.append(("against dense", " ".join(part for part in (words.gap(gap), words.interval(gap)) if part)))
        facts.append(("p", f"{gap.p:.2g} after Holm's correction" if gap.p is not None else ""))
        facts.append(("compared by", gap.how))
    return [(name, text) for name, text in facts if text]


def _source_facts(source: Any) -> list[tuple[str, str]]:
    facts = [("how", source.quantity.how), ("value", _exact(source.quantity.value, source.quantity.unit))]
    if source.score is not None:
        facts += [(name, str(value)) for name, value in source.score.data.items()]
        facts += [(f"shortcut: {name}", words.score(value)) for name, value in source.score.baselines.items()]
    return [*facts, ("taken", source.record.started), ("environment", _where(source.record.environment))]


def _details(row: Row) -> dict[str, Any]:
    """The content of a row's dialog: its recipe, plan, untouched sites and records."""
    last = (row.records or row.failures)[-1]
    return {
        "heading": row.name,
        "recipe": yaml.safe_dump(row.recipe, sort_keys=False) if row.recipe else "{}  # nothing changed",
        "plan": [{str(key): _plain(value) for key, value in line.items()} for line in last.plan],
        "untouched": [list(pair) for pair in last.untouched],
        "records": [
            {
                "file": f"{record.id}.json",
                "seed": record.seed,
                "status": record.status,
                "reason": record.reason or "",
                "started": record.started,
                "seconds": f"{record.seconds:.1f} s",
                "study": f"{record.study} {record.study_digest}",
            }
            for record in (*row.records, *row.failures)
        ],
        "superseded": row.superseded,
    }


def _score_help(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The shortcut baselines of a score, and whether higher or lower is better."""
    cell = next(row.scores[key] for row in rows if key in row.scores)
    score = cell.sources[0].score
    return {
        "better": score.better,
        "baselines": [(name, words.score(value)) for name, value in score.baselines.items()],
    }


def _environments(records: Sequence[Record]) -> list[tuple[int, list[tuple[str, str]]]]:
    """Every distinct environment with the number of its records."""
    environments: dict[str, tuple[int, dict[str, Any]]] = {}
    for record in records:
        key = json.dumps(record.environment, sort_keys=True, default=str)
        environments[key] = (environments[key][0] + 1 if key in environments else 1, record.environment)
    return [
        (count, [(str(name), _plain(value)) for name, value in content.items()])
        for count, content in environments.values()
        if content
    ]


def _where(content: dict[str, Any]) -> str:
    parts = [content.get("processor"), f"{content['threads']} threads" if content.get("threads") else None]
    packages = content.get("packages") or {}
    parts += [f"{name} {packages[name]}" for name in ("torch", "transformers", "taut") if packages.get(name)]
    parts.append(f"commit {content['commit']}" if content.get("commit") else None)
    return ", ".join(str(part) for part in parts if part) or "not recorded"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def _exact(value: float | None, unit: str) -> str:
    return "n/a" if value is None else f"{value:.10g} {unit}".strip()


def _for_script(content: Any) -> Markup:
    """JSON that cannot close the script element around it."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed. `</script` can only occur inside strings, where the backslash is harmless."""
    return vl_convert.javascript_bundle().replace("</script", "<\\/script")

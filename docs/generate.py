"""Writes the generated halves of README and docs; with --check only says whether they are true.

python docs/generate.py            rewrite what is generated
python docs/generate.py --check    exit 1 and name the files that are out of date
python docs/generate.py --contract [METHOD ...]
                                   run the contract suite again and keep its result in docs/contract.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import taut
from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.registry import METHODS
from taut.core.site import AttentionSite, LinearSite, MemorySite, Site, TableSite
from taut.methods.base import Method
from taut.studies.ledger import Ledger
from taut.studies.protocol import Row, score_keys, summary
from taut.studies.selection import behind_front
from taut.studies.words import score, signed

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "docs" / "methods"
CONTRACT = ROOT / "docs" / "contract.json"
TABLES, RECORDS = ROOT / "docs" / "token_tables.md", ROOT / "studies" / "records" / "embeddings"
BEGIN, END = "<!-- generated: do not edit below -->", "<!-- end of generated -->"
EXAMPLES: dict[str, tuple[str, Site, list[dict[str, Any]]]] = {
    "embedding": (
        "a tied table of 30,522 x 384 in float32",
        TableSite(slot="embedding", path="table", rows=30522, width=384, heads=("head",)),
        [{}, {"keep": 0.5}, {"keep": 0.25}],
    ),
    "linear": (
        "a map from 1024 to 4096 in float32",
        LinearSite(slot="feedforward", path="up", inputs=1024, outputs=4096, bias=True, layer=0, role="up"),
        [{}, {"keep": 0.5}, {"keep": 0.32}],
    ),
    "attention": (
        "causal attention, 12 heads of width 64, n = 4096",
        AttentionSite(
            slot="attention",
            path="attention",
            layer=0,
            heads=12,
            key_heads=12,
            head_width=64,
            causal=True,
            position="rope",
            length=4096,
        ),
        [{}, {"keep": 0.25}],
    ),
    "memory": (
        "the cache of 12 layers, 12 heads of width 64, n = 4096",
        MemorySite(slot="memory", path="", layers=12, key_heads=12, head_width=64, position="rope", length=4096),
        [{}, {"keep": 0.25}],
    ),
}


def knobs(method: type[Method]) -> str:
    """The knobs as a table."""
    fields = method.Knobs.model_fields
    if not fields:
        return "No knobs."
    lines = ["| knob | default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        dial = " (the dial: give this or `keep`)" if name == method.dial else ""
        lines.append(f"| `{name}` | `{field.get_default()}` | {meaning}{dial} |")
    return "\n".join(lines)


def costs(method: type[Method], kind: str) -> str:
    """Predicted cost at one plain site, for a few settings."""
    title, site, settings = EXAMPLES[kind]
    lines = [
        f"Predicted for {title}:",
        "",
        "| setting | parameters | bytes | FLOPs/token | cache bytes/token |",
        "|---|---|---|---|---|",
        _row("original", site.dense()),
    ]
    for setting in settings:
        keep = setting.get("keep")
        if (keep is None) != (method.dial is None or _has_default(method)) and (keep is None or method.dial is None):
            continue
        try:
            chosen = method.parse({}, keep)
            chosen = chosen if keep is None else chosen.solve(site, keep)
        except TautError:
            continue
        solved = ", ".join(f"{key}={value}" for key, value in chosen.knobs.model_dump(exclude_none=True).items())
        label = f"keep {keep} → {solved}" if keep is not None else solved or "as it is"
        lines.append(_row(label, chosen.predict(site)))
    return "\n".join(lines)


def contract(key: str) -> str:
    """What the contract suite found, check by check."""
    found = json.loads(CONTRACT.read_text()) if CONTRACT.exists() else {}
    if key not in found:
        return "Contract suite: not run yet (`make contract`)."
    lines = ["| check | passed on |", "|---|---|"]
    lines += [f"| {check} | {', '.join(families) or 'does not apply'} |" for check, families in found[key].items()]
    return "\n".join(lines)


def card(key: str) -> str:
    method = METHODS.get(key)
    sections = [f"## Knobs\n\n{knobs(method)}", f"## Cost\n\n{costs(method, key.partition('.')[0])}"]
    return "\n\n".join([*sections, f"## Contract\n\n{contract(key)}"])


def catalogue() -> str:
    """The table of methods in README."""
    lines = ["| method | what it does | source |", "|---|---|---|"]
    for row in taut.methods():
        if row["id"] not in METHODS.built_in():
            continue
        source = row["source"].replace("|", "\\|")
        lines.append(f"| [`{row['id']}`](docs/methods/{row['id']}.md) | {row['summary']} | {source} |")
    return "\n".join(lines)


def token_tables() -> str:
    """What one slot's bytes buy: every row of the committed study, the most bits first."""
    rows = [row for row in summary(Ledger(RECORDS).records()) if row.records and row.role != "identity"]
    keys = score_keys(rows)[:2]
    behind = {key: behind_front(rows, key, "embedding") for key in keys}
    dense = next(row for row in rows if row.role == "dense").bytes_per_slot["embedding"]
    heads = [part for key in keys for part in (key, "against dense", "behind the front")]
    lines = [f"| recipe | bits | table kB | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].bytes_per_slot["embedding"], rows[index].name))
    for index in order:
        row, size = rows[index], rows[index].bytes_per_slot["embedding"]
        cells = [cell for key in keys for cell in _score_cells(row, key, behind[key][index])]
        lines.append(f"| {row.recipe_name} | {32 * size / dense:.2f} | {size / 1e3:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_contract(keys: list[str]) -> None:
    """The contract of these methods (of all, when none is named) on the four representatives; a failure stops here."""
    known = json.loads(CONTRACT.read_text()) if CONTRACT.exists() else {}
    found: dict[str, dict[str, list[str]]] = {key: known[key] for key in METHODS.built_in() if key in known and keys}
    for key in keys or METHODS.built_in():
        print(key, file=sys.stderr)
        rows = taut.check(key)
        failed = [row for row in rows if row["status"] == "failed"]
        if failed:
            sys.exit(f"{key}: {failed[0]['check']} failed on {failed[0]['case']}: {failed[0]['reason']}")
        found[key] = {}
        for row in rows:
            families = found[key].setdefault(row["check"], [])
            family = row["case"].rpartition("@")[2]
            if row["status"] == "passed" and family not in families:
                families.append(family)
    CONTRACT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main() -> None:
    if "--contract" in sys.argv:
        run_contract(sys.argv[sys.argv.index("--contract") + 1 :])
    targets = {ROOT / "README.md": catalogue()} | {CARDS / f"{key}.md": card(key) for key in METHODS.built_in()}
    extra = set(CARDS.glob("*.md")) - set(targets)
    targets[TABLES] = token_tables()
    stale = []
    for path, generated in targets.items():
        before = path.read_text() if path.exists() else ""
        if before.count(BEGIN) != 1 or before.count(END) != 1:
            sys.exit(f"{path.relative_to(ROOT)}: write its own half first, with the two markers:\n{BEGIN}\n{END}")
        head, _, rest = before.partition(BEGIN)
        after = f"{head}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"
        if after != before:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(after)
    if extra:
        sys.exit(f"a card without a method: {', '.join(path.name for path in sorted(extra))}")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date, run make docs: {', '.join(str(path.relative_to(ROOT)) for path in stale)}")


def _score_cells(row: Row, key: str, behind: float) -> tuple[str, str, str]:
    cell = row.scores[key]
    gap = "" if cell.gap is None else f"{signed(cell.gap.value)} [{signed(cell.gap.low)}, {signed(cell.gap.high)}]"
    return score(cell.value), gap, "on it" if behind == 0 else score(behind)


def _row(label: str, cost: Cost) -> str:
    return (
        f"| {label} | {cost.parameters:,} | {cost.bytes:,} | {cost.flops_per_token:,.0f} "
        f"| {cost.cache_bytes_per_token:,.0f} |"
    )


def _has_default(method: type[Method]) -> bool:
    return method.dial is None or method.Knobs.model_fields[method.dial].get_default() is not None


if __name__ == "__main__":
    main()

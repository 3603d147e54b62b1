"""The report: from records alone, offline, and nothing in it runs that a record contains."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import vl_convert
from rich.console import Console
from sample_records import quickstart, record, spec

from taut.core.errors import TautError
from taut.core.record import Quantity, Record
from taut.reporting.figures import config, draw, save
from taut.reporting.highlights import highlights
from taut.reporting.page import page, write
from taut.reporting.scatter import PLACES, _place_labels
from taut.reporting.tables import terminal
from taut.studies import words
from taut.studies.comparison import Comparison
from taut.studies.ledger import Ledger
from taut.studies.protocol import Gap, summary

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}\u2028"


class Reader(HTMLParser):
    """What a browser would see: elements, their attributes, and the text of scripts and of the rest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data
        else:
            self.text += data

    def data(self) -> dict:
        index = [attributes.get("id") for tag, attributes in self.elements if tag in ("script", "style")].index("data")
        return json.loads(self.scripts[index])


@pytest.fixture(scope="module")
def html() -> str:
    return page(quickstart(), [("runs/broken.json", "content: EOF")])


@pytest.fixture(scope="module")
def evil() -> str:
    good = quickstart()[:6]
    bad = [
        record(spec(EVIL, {"embedding": {"method": EVIL, "knob": EVIL}}, study=EVIL), 0.01, 40e6, plan=({EVIL: EVIL},)),
        record(spec("dense", model=EVIL), environment={EVIL: EVIL}),
        spec("x", {"memory": {"method": "m"}}).record("failed", reason=EVIL),
        record(spec("how", {"embedding": {"method": "y"}}), costs={EVIL: Quantity(value=1.0, unit=EVIL, how=EVIL)}),
        record(spec("left", {"embedding": {"method": "z"}}), untouched=((EVIL, EVIL),), bytes_per_slot={EVIL: 5}),
    ]
    return page([*good, *bad], [(EVIL, EVIL)], EVIL)


def test_everything_is_there(html: str) -> None:
    reader = Reader(html)
    for one in quickstart():
        assert one.recipe_name in reader.text
    for words_expected in (
        "memory: no site: an encoder keeps no cache",
        "failed as expected",
        "runs/broken.json",
        "1.21× slower",
        "1.81× faster",
        "within noise",
        "word overlap 0.4300",
        "torch 2.13.0",
    ):
        assert words_expected in reader.text, words_expected


def test_every_cell_says_where_it_comes_from(html: str) -> None:
    reader = Reader(html)
    cells = reader.data()["cells"]
    buttons = [attributes["data-cell"] for _, attributes in reader.elements if "data-cell" in attributes]
    assert sorted(map(int, buttons)) == list(range(len(cells)))
    ids = {one.id for one in quickstart()}
    for cell in cells:
        assert cell["how"]
        for source in cell["sources"]:
            facts = dict(source["facts"])
            assert source["record"] in ids
            assert "torch 2.13.0" in facts["environment"]
    scored = next(cell for cell in cells if "mrr" in cell["heading"])
    assert dict(scored["sources"][0]["facts"])["sha256"] == "ab" * 32
    assert scored["sources"][0]["count"] == 120


def test_a_missing_value_is_told_with_its_reason(html: str) -> None:
    rows = summary([record(), record(spec("a", {"embedding": {"method": "low_rank"}}), costs={
        "peak_bytes": Quantity(value=5.0, unit="bytes", how="read")})])  # fmt: skip
    reader = Reader(page([one for row in rows for one in row.records]))
    assert ("td", "not asked for") in [(tag, attributes.get("title")) for tag, attributes in reader.elements]
    assert "n/a" in reader.text


def test_the_page_loads_nothing(html: str) -> None:
    reader = Reader(html)
    for tag, attributes in reader.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not {"src", "href", "srcset", "action", "background"} & attributes.keys()
        if attributes.get("http-equiv") == "Content-Security-Policy":
            assert attributes["content"].startswith("default-src 'none';")
    assert "Content-Security-Policy" in [attributes.get("http-equiv") for _, attributes in reader.elements]
    assert "@import" not in html
    assert "url(" not in Path(page.__code__.co_filename).with_name("page").joinpath("page.css").read_text()
    assert 0.8e6 < len(html.encode()) < 2e6


def test_nothing_from_a_record_becomes_markup(html: str, evil: str) -> None:
    honest, attacked = Reader(html), Reader(evil)
    tags = [tag for tag, _ in attacked.elements]
    assert tags.count("script") == [tag for tag, _ in honest.elements].count("script") == 3
    assert "img" not in tags
    assert not [name for _, attributes in attacked.elements for name in attributes if name.startswith("on")]
    assert EVIL.replace("\u2028", "") in attacked.text.replace("\u2028", ""), "it is shown as it is"
    assert "49" not in re.findall(r"&(?:#39;|amp;)(\d\d)", evil), "templates inside records stay text"
    content = json.dumps(attacked.data(), ensure_ascii=False)
    assert json.dumps(EVIL, ensure_ascii=False)[1:-1] in content


def test_the_scripts_of_the_page_add_text_only() -> None:
    script = Path(page.__code__.co_filename).with_name("page").joinpath("page.js").read_text()
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "http:/"):
        assert dangerous not in script.replace('"http://www.w3.org/2000/svg"', "")


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with pytest.raises(TautError, match="no records found"):
        write(ledger, tmp_path / "report.html")
    for one in quickstart()[:3]:
        ledger.write(one)
    out = write(ledger, tmp_path / "deep" / "report.html", tmp_path / "figures")
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png"}
    assert write(ledger.path, None) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(TautError, match="cannot write the report"):
        write(ledger, tmp_path / "file" / "report.html")
    with pytest.raises(TautError, match="cannot write the figures"):
        write(ledger, None, tmp_path / "file")


def test_a_ledger_of_failures_or_damage_alone_is_drawn(tmp_path: Path) -> None:
    only = spec("x", {"memory": {"method": "window_sink"}}).record("failed", reason="no cache")
    assert "no cache" in Reader(page([only])).text
    assert "broken.json" in Reader(page([], [("broken.json", "EOF")])).text


def test_pictures_are_drawn_and_compile(tmp_path: Path) -> None:
    rows = summary(quickstart())
    figures = draw(rows)
    assert [figure.kind for figure in figures] == ["size", "prefill", "difference", "slots"]
    for figure in figures:
        vl_convert.vegalite_to_vega(figure.spec() | {"config": config(dark=True)})
    paths = save(rows, tmp_path)
    assert len(set(paths)) == len(paths) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_the_front_of_the_picture_is_the_pareto_front() -> None:
    figure = draw(summary(quickstart()))[0].spec()
    values = next(layer["data"]["values"] for layer in figure["layer"] if layer["mark"]["type"] == "line")
    sizes, scores = [step["x"] for step in values], [step["score"] for step in values]
    assert sizes == sorted(sizes)
    assert scores == sorted(scores)
    assert sizes[0] == 24.0


def slot_study() -> list[Record]:
    """Three methods for the token table at two sizes each, one of them healed too, and one recipe of two slots."""
    records = [record()]
    losses = {("low_bit", 8): 1e-5, ("low_bit", 2): 0.01, ("product_quantized", 2): 1e-3, ("low_rank", 8): 0.2}
    for (method, bits), loss in losses.items():
        for heal in (0, 200) if method == "product_quantized" else (0,):
            recipe = {"embedding": {"method": method, "bits": bits}}
            trial = spec(f"{method} {bits}{' healed' if heal else ''}", recipe, heal=heal)
            slots = {"embedding": bits * 1_000_000, "other": 5}
            records.append(record(trial, loss=loss / (1 + heal), bytes_per_slot=slots))
    both = {"embedding": {"method": "low_bit", "bits": 8}, "projection": {"method": "low_bit"}}
    return [*records, record(spec("both", both), loss=0.01)]


def test_a_slot_has_a_picture_of_its_own_front() -> None:
    figures = [figure for figure in draw(summary(slot_study())) if figure.kind == "embedding-front"]
    assert len(figures) == 1
    layers = figures[0].spec()["layer"]
    points = {point["recipe"]: point for layer in layers for point in layer["data"]["values"] if "behind" in point}
    assert set(points) == {
        *("low_bit 8", "low_bit 2", "low_rank 8", "product_quantized 2", "product_quantized 2 healed"),
    }
    assert points["product_quantized 2 healed"]["behind"] == "on the front"
    assert points["product_quantized 2 healed"]["healed"] == "healed"
    assert points["low_rank 8"]["behind"].endswith("behind the front")
    steps = next(layer["data"]["values"] for layer in layers if layer["mark"]["type"] == "line")
    assert [step["x"] for step in steps] == sorted({step["x"] for step in steps})


def test_healed_and_unhealed_are_two_rows() -> None:
    rows = summary(slot_study())
    assert sorted(row.heal for row in rows if row.recipe_name.startswith("product")) == [0, 200]


def test_labels_stay_inside_and_apart() -> None:
    """Points on one spot get labels in different places, or none; a label at the rim points inwards."""
    points = [{"x": x, "score": 0.0, "recipe": "a name of some length", "family": "dense"} for x in (0, 0, 0, 1)]
    _place_labels(points, float, lambda score: (score + 1) / 2, set())
    places = [point["place"] for point in points if "place" in point]
    assert PLACES[points[0]["place"]][0] == "left"
    assert PLACES[points[3]["place"]][0] == "right"
    assert len({point.get("place") for point in points[:3]}) == 3
    assert len(places) >= 3
    crowd = [{"x": 0.5, "score": 0.0, "recipe": "name", "family": "dense"} for _ in range(30)]
    _place_labels(crowd, float, lambda score: (score + 1) / 2, set())
    assert len(crowd) > sum("place" in point for point in crowd) >= 4


def test_highlights_tell_the_bad_beside_the_good() -> None:
    cards = {card.label: card for card in highlights(summary(quickstart()))}
    assert cards["slower than dense"].recipe == "local attention"
    assert cards["measurably worse"].recipe == "feed-forward low-rank 0.32"
    assert cards["fastest prefill without a visible loss"].recipe == "linears int8"
    assert highlights(summary([record()])) == []


def test_the_terminal_table_has_words_and_reasons() -> None:
    stream = io.StringIO()
    rows = summary([*quickstart(), record(spec("[bold]odd", {"embedding": {"method": "odd"}}))])
    (table,) = Comparison(rows).tables()
    Console(file=stream, width=200).print(terminal(table, 200, ruled=True))
    text = stream.getvalue()
    for expected in ("local attention", "1.21× slower", "38% smaller", "within noise", "[bold]odd"):
        assert expected in text
    assert "cache on an encoder failed: memory: no site: an encoder keeps no cache" in table.notes


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (90_868_376, "bytes", "90.9 MB"),
        (512, "B", "512 B"),
        (999_600, "B", "1 MB"),
        (0.0213, "s", "21.3 ms"),
        (2.5e-5, "s", "25 µs"),
        (61.2, "s", "61.2 s"),
        (22_713_216, "parameters", "22.7 M"),
        (6012.3, "tokens/s", "6.01 k tokens/s"),
        (0.5, "J", "0.5 J"),
        (0, "bytes", "0 B"),
    ],
)
def test_numbers_as_people_read_them(number: float, unit: str, text: str) -> None:
    assert words.quantity(number, unit) == text


@pytest.mark.parametrize(
    ("value", "word", "names", "text"),
    [
        (0.5, "faster", ("faster", "slower"), "2.00× faster"),
        (1.25, "slower", ("faster", "slower"), "1.25× slower"),
        (1.01, "within noise", ("faster", "slower"), "1.01× within noise"),
        (0.62, "smaller", ("smaller", "larger"), "38% smaller"),
        (0.25, "smaller", ("smaller", "larger"), "4× smaller"),
        (1.004, "larger", ("smaller", "larger"), "0.4% larger"),
        (1.0, "same", ("smaller", "larger"), "same"),
        (1.3, "", None, "1.30×"),
    ],
)
def test_ratios_as_people_read_them(value: float, word: str, names: tuple[str, str] | None, text: str) -> None:
    assert words.gap(Gap("ratio", value, "", word=word), names) == text


def test_recipes_on_one_line() -> None:
    recipe = {"feedforward": [{"method": "low_bit", "layers": "0"}, {"method": "low_rank", "keep": 0.5, "store": {"method": "low_bit"}}]}  # fmt: skip  # noqa: E501
    assert words.recipe_line(recipe) == (
        "feed-forward: low_bit layers 0 · feed-forward: low_rank keep 0.5 stored as low_bit"
    )


def test_several_models_and_seeds_fit_on_one_page() -> None:
    records: list[Record] = [
        record(spec(name, recipe, model=model, seed=seed), loss, size, started=f"{seed}")
        for model in ("one", "two")
        for seed in (0, 1)
        for name, recipe, loss, size in (
            ("dense", {}, 0.0, 90e6),
            ("half", {"embedding": {"method": "low_rank"}}, 0.02, 60e6),
        )
    ]
    reader = Reader(page(records))
    assert ("select", {"id": "chart-model"}) in reader.elements
    assert {chart["model"] for chart in reader.data()["charts"]} == {"one", "two"}
    assert len(reader.data()["details"][1]["records"]) == 2

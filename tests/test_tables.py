"""Tables in narrow terminals: no word and no number is broken, and nothing is lost."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from folders import tiny_folder
from rich.console import Console

from taut.cli import tables
from taut.core.table import Table
from taut.reporting.tables import terminal

SIZES = ("46.9 M → 12 M (26%)", "14.2 M → 3.65 M (26%)", "7.08 M → 7.08 M (100%)")
LONG = "rotated rows of unequal width: a router gives columns to the tokens that gain most from them"
TABLES = {
    "plan": Table(
        ("slot", "method", "sites", "bytes", "FLOPs/token", "cache B/token"),
        [
            ("embedding", "embedding.low_bit bits=4 group=64", "1", SIZES[0], "-", "-"),
            ("feedforward", "linear.low_rank rank=96", "12", SIZES[1], SIZES[2], "-"),
        ],
        total=("together", "", "13", SIZES[1], SIZES[2], "-"),
    ),
    "methods": Table(
        ("method", "what it does", "dial", "knobs"),
        [
            ("embedding.dynamic", LONG, "width", "width=None, page=None, classes=(0.0, 0.125, 0.25, 0.5)"),
            ("embedding.product_quantized", LONG, "subvector", "subvector=None, centroids=256, weighted=True"),
        ],
    ),
    "evaluate": Table(
        ("task", "metric", "score", "95 % interval", "baselines", "data"),
        [
            ("docs_retrieval", "recall_at_10", "0.8215", "0.7911 to 0.8502", "chance 0.0412, words 0.6613",
             "docs " + 32 * "f"),
            ("sts", "spearman", "0.8672", "0.8551 to 0.8780", "-", "stsb:dev " + 32 * "0"),
        ],
    ),
    "compare": Table(
        ("recipe", "docs_retrieval recall_at_10", "agreement pooled_cosine", "size", "latency", "peak memory"),
        [
            ("dense", "0.8215", "1.0000", "90.9 MB", "21.3 ms", "512 MB"),
            ("int 4, groups of 64", "0.8172\n−0.0043 within noise", "0.9987\n−0.0013 worse", "50.6 MB\n44% smaller",
             "19.1 ms\n1.12× faster", "480 MB\n6% smaller"),
        ],
        title="minilm",
        marks={(1, 2): "bad"},
    ),
    "check": Table(("check", "passed", "skipped", "failed"), [("saved_and_loaded_model_is_the_same", "12", "0", "3")]),
    "context": Table(
        ("model", "effective context", "95 % interval", "nats at 64", "nats at 512"),
        [("llama-of-many-layers", "448 or more", "320 to 448", "3.1415", "2.7183")],
    ),
}  # fmt: skip


def drawn(table: Table, width: int, ruled: bool) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(terminal(table, width, ruled=ruled), overflow="ignore", crop=False)
    return [re.sub("[│┃━┏┓┡┩└┘┴┳╇─╈┷]", " ", line).rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_every_word_is_whole_and_in_its_line(name: str, width: int) -> None:
    table = TABLES[name]
    lines = drawn(table, width, ruled=name == "compare")
    rows = [*table.rows, *([table.total] if table.total else [])]
    words = {word for row in rows for cell in row for word in cell.split()} - {"-"}
    assert words <= {word for line in lines for word in line.split()}
    assert all(len(line) <= width for line in lines)
    for number in re.findall(r"\d[\d.]* [kMGm]?[BMs]\b", " ".join(cell for row in rows for cell in row)):
        assert any(number in line for line in lines), number


def test_a_wide_terminal_keeps_each_row_in_one_line() -> None:
    lines = drawn(TABLES["plan"], 140, ruled=False)
    assert len(lines) == 4
    assert lines[2].split("  ")[0] == "feedforward"
    assert all(size in line for size, line in zip(SIZES, lines[1:3], strict=False))


def test_a_column_takes_further_lines() -> None:
    table = Table(("name", "text"), [("one", "a word and another"), ("two", "7.5 M")])
    assert drawn(table, 16, ruled=False) == [
        "name  text",
        "one   a word and",
        "      another",
        "two   7.5 M",
    ]


def test_too_narrow_a_table_becomes_blocks() -> None:
    table = Table(("name", "first", "second"), [("one", "abcdefgh", "12345678 kB"), ("two", "-", "9 kB\nless")])
    assert drawn(table, 20, ruled=False) == [
        "one",
        "  first   abcdefgh",
        "  second  12345678 kB",
        "two",
        "  second  9 kB",
        "          less",
    ]


def test_columns_sets_the_width_of_a_pipe(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "llama")
    words = [sys.executable, "-m", "taut"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("feedforward: {method: low_rank, rank: 8}\n")
    done = subprocess.run(
        [*words, "apply", folder, recipe, "--out", tmp_path / "light"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown = {}
    for width in (60, 80, 100):
        environment = {**os.environ, "COLUMNS": str(width)}
        out = subprocess.run(
            [*words, "show", tmp_path / "light"], capture_output=True, text=True, env=environment, check=True
        ).stdout
        path, recipe_line, *table = out.splitlines()
        assert path.endswith("bytes")
        assert "low_rank" in recipe_line
        assert all(len(line.rstrip()) <= width for line in table)
        assert "linear.low_rank" in out
        shown[width] = table
    assert shown[60] != shown[100]


@pytest.mark.parametrize(("is_terminal", "lines"), [(False, 1), (True, 3)])
def test_prose_is_one_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, lines: int) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(tables, "OUT", Console(file=stream, width=60, force_terminal=is_terminal, no_color=True))
    tables.say("  embeddings: " + "word " * 12 + "x" * 80)
    out = stream.getvalue()
    assert out.startswith("  embeddings: word")
    assert out.count("\n") == lines
    assert "x" * 80 in out
    assert out.split() == ["embeddings:", *["word"] * 12, "x" * 80]

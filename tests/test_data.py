"""Named data: fixed order, stable hashes, layouts, and the messages for wrong input."""

import gzip
import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from taut import data
from taut.core.errors import TautError

ROWS = [("a fine film", "1"), ("a dull film", "0"), ("two hours, lost", "0"), ("go and see", "1"), ("so, so", "0")]
PAIRS = [("a cat sits", "a cat sat", "4.5"), ("a dog", "a fish", "0.5"), ("the rain", "rain, a lot", "3")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAUT_DATA", str(tmp_path))
    return tmp_path


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


def real(name: str, split: str | None = None) -> None:
    if not data.available(name, split):
        pytest.skip(f"needs {name}: set TAUT_DATA to a folder that holds it")


def test_import_needs_no_torch():
    code = "import sys, taut.data; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_built_in_text_is_stable_and_names_its_python():
    first, second = data.text("python_topics"), data.text("python_topics")
    assert first.sha256 == second.sha256 == hashlib.sha256(first.rows[0][0].encode()).hexdigest()
    assert len(first.rows[0][0]) > 300_000
    assert ".".join(map(str, sys.version_info[:3])) in first.source
    assert data.available("python_topics")


def test_limit_cuts_text_and_changes_its_hash():
    whole, part = data.text("python_topics"), data.text("python_topics", limit=1000)
    assert whole.rows[0][0].startswith(part.rows[0][0])
    assert len(part.rows[0][0]) == 1000
    assert part.sha256 != whole.sha256


def test_docstrings_share_no_sentence_with_the_evaluation_text():
    topics, docstrings = data.paragraphs("python_topics"), data.paragraphs("python_docstrings")
    seen, used = (
        {s for row in texts.rows for s in data.sentences(row[0]) if " " in s} for texts in (topics, docstrings)
    )
    assert len(seen) > 1000
    assert len(used) > 1000
    assert seen.isdisjoint(used)


def test_calibration_texts_are_apart_from_evaluation(folder: Path):
    topics = data.paragraphs("python_topics").column(0)
    builtin = data.calibration_texts("builtin")
    assert len(set(builtin)) == 500
    assert not set(builtin) & set(topics)
    content = "\n\n".join(["First of all.", max(topics, key=len), "Last of all."])
    (folder / "own.txt").write_text(content, encoding="utf-8")
    assert data.calibration_texts(folder / "own.txt") == ["First of all.", "Last of all."]
    (folder / "topics.txt").write_text(max(topics, key=len), encoding="utf-8")
    with pytest.raises(TautError, match="no text is left after removing the sentences of the evaluation"):
        data.calibration_texts(folder / "topics.txt")
    (folder / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(TautError, match="it contains no text"):
        data.calibration_texts(folder / "empty.txt")


def test_without_drops_rows_that_share_a_sentence():
    train = data.Data("s", "train", (("One here. Two here.", "0"), ("Three here.", "1"), ("Two here.", "1")))
    evaluation = data.Data("s", "dev", (("Nothing. Two here. Four.", "1"),))
    assert train.without(evaluation).rows == (("Three here.", "1"),)


def test_the_order_of_a_file_does_not_matter(folder: Path):
    forward = data.labelled(write(folder / "a.tsv", ["\t".join(row) for row in ROWS]))
    backward = data.labelled(write(folder / "b.tsv", ["\t".join(row) for row in reversed(ROWS)]))
    assert forward.rows == backward.rows
    assert forward.sha256 == backward.sha256
    assert sorted(forward.rows) == sorted(ROWS)
    assert list(forward.rows) != ROWS
    assert forward.head(2).rows == forward.rows[:2]
    assert forward.head(2).facts()["items"] == "2"


def test_every_layout_gives_the_same_rows(folder: Path):
    expected = data.hashed(ROWS)
    tabs = [f"{label}\t{text}" for text, label in ROWS]
    named = [json.dumps({"id": 7, "label": label, "text": text}) for text, label in ROWS]
    quoted = [f'"{text}",{label}' for text, label in ROWS]
    layouts = [
        write(folder / "labels_first.tsv", tabs),
        write(folder / "header.tsv", ["sentence\tlabel", *("\t".join(row) for row in ROWS)]),
        write(folder / "quoted.csv", quoted),
        write(folder / "space.txt", [f"{label} {text}" for text, label in ROWS]),
        write(folder / "objects.jsonl", named),
        write(folder / "array.json", ["[", ",".join(named), "]"]),
    ]
    for packer, suffix in ((gzip, ".gz"), (lzma, ".xz")):
        for name in layouts[:3]:
            (folder / (name + suffix)).write_bytes(packer.compress((folder / name).read_bytes()))
            layouts.append(name + suffix)
    assert {name: data.labelled(name).rows for name in layouts} == dict.fromkeys(layouts, expected)


def test_columns_by_name_and_by_position(folder: Path):
    name = write(folder / "wide.tsv", [f"x\t{label}\t\t{text}" for text, label in ROWS])
    assert data.labelled(name, columns="3,1").rows == data.hashed(ROWS)
    with pytest.raises(TautError, match="cannot guess the columns; give columns as TEXT,LABEL"):
        data.labelled(name)
    with pytest.raises(TautError, match=r"no column 4: .*choices: 0, 1, 2, 3"):
        data.labelled(name, columns="4,1")
    name = write(folder / "named.tsv", ["label\tbody", *(f"{label}\t{text}" for text, label in ROWS)])
    assert data.labelled(name, columns="body,label").rows == data.hashed(ROWS)
    with pytest.raises(TautError, match="no column 'bodi': did you mean 'body'"):
        data.labelled(name, columns="bodi,label")


def test_scored_pairs_find_the_score_in_either_place(folder: Path):
    last = write(folder / "last.tsv", ["\t".join(row) for row in PAIRS])
    first = write(folder / "first.tsv", ["\t".join((c, a, b)) for a, b, c in PAIRS])
    assert data.scored_pairs(last).rows == data.scored_pairs(first).rows == data.hashed(PAIRS)
    bad = write(folder / "bad.tsv", ["a\tb\thigh", "c\td\t2"])
    with pytest.raises(TautError, match="cannot guess the columns"):
        data.scored_pairs(bad)
    with pytest.raises(TautError, match="score 'high' of 'a' is not a number"):
        data.scored_pairs(bad, columns="0,1,2")


def test_a_folder_of_files_is_one_set(folder: Path):
    (folder / "year").mkdir()
    write(folder / "year" / "news.test.tsv", ["\t".join(row) for row in PAIRS[:2]])
    write(folder / "year" / "web.test.tsv", ["\t".join(row) for row in PAIRS[2:]])
    assert data.scored_pairs("year", "test").rows == data.hashed(PAIRS)
    with pytest.raises(TautError, match=r"no files for this split in the folder: .*test"):
        data.scored_pairs("year", "tset")


def test_the_source_never_names_a_place_on_the_machine(folder: Path):
    path = folder / "a.tsv"
    write(path, ["\t".join(row) for row in ROWS])
    assert data.labelled(str(path)).source == data.labelled("a.tsv").source == "file a.tsv"


def test_text_is_kept_as_it_is(folder: Path):
    content = "Grüße\r\n\r\n  two  \n\n\nthree\n"
    (folder / "t.txt").write_bytes(content.encode())
    assert data.text("t.txt").rows == ((content,),)
    assert data.text("t.txt").sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert data.paragraphs("t.txt").column(0) == ["Grüße", "two", "three"]
    (folder / "old.txt").write_bytes("Grüße".encode("latin-1"))
    assert data.text("old.txt").rows == (("Grüße",),)


def test_wrong_names_get_one_line_with_the_nearest(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write(folder / "a.tsv", ["x\ty"])
    with pytest.raises(TautError, match="no such name, file or folder: did you mean 'python_topics'"):
        data.text("python_topic")
    with pytest.raises(TautError, match=r"did you mean 'a.tsv'"):
        data.text(str(folder / "a.tsw"))
    with pytest.raises(TautError, match=r"unknown split 'test': .*\(choices: dev, train\)"):
        data.labelled("imdb", "test")
    with pytest.raises(TautError, match=r"imdb_val.jsonl.xz is not below TAUT_DATA"):
        data.labelled("imdb")
    with pytest.raises(TautError, match="has no split 'dev'"):
        data.labelled("a.tsv", "dev")
    with pytest.raises(TautError, match="running text; expected a table TEXT,LABEL"):
        data.labelled("python_topics")
    with pytest.raises(TautError, match="unknown split 'dev'"):
        data.text("python_topics", "dev")
    monkeypatch.delenv("TAUT_DATA")
    with pytest.raises(TautError, match="TAUT_DATA is not set"):
        data.labelled("imdb")
    assert not data.available("imdb")
    assert not data.available("no_such_thing")
    assert not data.available("hub:a/b:train:text")


def test_damaged_files_are_named(folder: Path):
    whole = gzip.compress(b"1\tone\n0\ttwo\n" * 100)
    (folder / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TautError, match=r"cut.tsv.gz: not readable"):
        data.labelled("cut.tsv.gz")
    (folder / "bad.tsv.gz").write_bytes(whole[:12] + b"\xff" * 20 + whole[32:])
    with pytest.raises(TautError, match=r"bad.tsv.gz: not readable"):
        data.labelled("bad.tsv.gz")
    with pytest.raises(TautError, match="row 2 has 3 columns, the first row has 2"):
        data.labelled(write(folder / "ragged.tsv", ["a\t1", "b\t2\tc"]))
    with pytest.raises(TautError, match=r"empty.tsv: the file is empty"):
        data.labelled(write(folder / "empty.tsv", [""]))
    with pytest.raises(TautError, match="expected JSON objects with the same keys"):
        data.labelled(write(folder / "a.jsonl", ['{"text": "x", "label": 1}', '{"text": "y"}']))


def test_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*path: str, split: str) -> list[dict[str, object]]:
        asked.append((*path, split))
        return [{"sentence": text, "label": int(label), "idx": 0} for text, label in ROWS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("TAUT_DATA", raising=False)
    table = data.labelled("hub:owner/set:train:sentence,label")
    assert table.rows == data.hashed(ROWS)
    assert data.labelled("sst2").source == "hub:nyu-mll/glue/sst2:validation:sentence,label"
    assert data.text("hub:owner/set/part:dev:sentence").rows == (("\n".join(text for text, _ in ROWS),),)
    assert asked == [("owner/set", "train"), ("nyu-mll/glue", "sst2", "validation"), ("owner/set", "part", "dev")]
    with pytest.raises(TautError, match="expected the columns TEXT,LABEL"):
        data.labelled("hub:owner/set:train:sentence")
    with pytest.raises(TautError, match=r"the Hub failed \(KeyError"):
        data.labelled("hub:owner/set:train:text,label")
    with pytest.raises(TautError, match="expected hub:OWNER/NAME"):
        data.text("hub:set:train:sentence")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TautError, match="needs the package datasets"):
        data.text("hub:owner/set:dev:sentence")


@pytest.mark.parametrize(
    ("name", "rows", "labels"), [("sst2", 6735, 2), ("cola", 527, 2), ("imdb", 5000, 2), ("trec", 5452, 6)]
)
def test_real_tables(name: str, rows: int, labels: int):
    real(name)
    table = data.labelled(name)
    assert len(table.rows) == rows
    assert len(set(table.column(1))) == labels


@pytest.mark.parametrize(("name", "rows"), [("stsb", 1500), ("sts12", 2358), ("sts13", 1500), ("sts14", 3750)])
def test_real_pairs(name: str, rows: int):
    real(name)
    scores = [float(score) for score in data.scored_pairs(name).column(2)]
    assert len(scores) == rows
    assert min(scores) >= 0
    assert max(scores) <= 5


def test_the_hash_of_a_text_is_that_of_its_file():
    real("tinystories")
    assert data.text("tinystories").sha256.startswith("ccfead6f0383")

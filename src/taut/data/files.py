"""Finds named data and reads its files: tables, running text, JSON; plain, gz or xz; or from the Hub."""

import csv
import difflib
import gzip
import importlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taut.core.errors import TautError, nearest
from taut.data.builtin import BUILT_IN
from taut.data.rows import Data

FOLDER = "TAUT_DATA"
TEXT_HEADERS = ("text", "sentence")
LABEL_HEADERS = ("label",)
PAIR_HEADERS = ("sentence1", "sentence2")
PAIR_COLUMNS = "sentence1,sentence2,label"
SCORE_HEADERS = ("score", "label", "similarity_score")


@dataclass(frozen=True)
class Named:
    """A named data set: a file pattern per split, and its columns by header or by position (texts first)."""

    files: dict[str, str]
    columns: tuple[str | int, ...] = ()
    hub: dict[str, str] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The default split for evaluation."""
        return next((name for name in ("dev", "test") if name in self.files), next(iter(self.files)))


def _glue(name: str, columns: str) -> dict[str, str]:
    there = {"train": "train", "dev": "validation"}
    return {split: f"hub:nyu-mll/glue/{name}:{there[split]}:{columns}" for split in there}


NAMED = {
    "stsb": Named(
        {"train": "stsb/stsb-en-train.csv", "dev": "stsb/stsb-en-dev.csv"}, (0, 1, 2), _glue("stsb", PAIR_COLUMNS)
    ),
    "sts12": Named({"train": "sts/2012/*.train.tsv", "test": "sts/2012/*.test.tsv"}, (1, 2, 0)),
    "sts13": Named({"test": "sts/2013/*.test.tsv"}, (1, 2, 0)),
    "sts14": Named({"test": "sts/2014/*.test.tsv"}, (1, 2, 0)),
    "sst2": Named(
        {"train": "sst2/train.tsv.gz", "dev": "sst2/dev.tsv.gz"}, ("sentence", "label"), _glue("sst2", "sentence,label")
    ),
    "cola": Named(
        {"train": "cola/in_domain_train.tsv", "dev": "cola/in_domain_dev.tsv"}, (3, 1), _glue("cola", "sentence,label")
    ),
    "imdb": Named({"train": "imdb/imdb_train.jsonl.xz", "dev": "imdb/imdb_val.jsonl.xz"}, ("text", "label")),
    "trec": Named({"all": "sent_conv/TREC.train.all.gz"}, (1, 0)),
    "movie_reviews": Named({"all": "sent_conv/rt-polarity.all.gz"}, (1, 0)),
    "subjectivity": Named({"all": "sent_conv/subj.all.gz"}, (1, 0)),
    "tinystories": Named({"sample": "tinystories/sample.txt"}),
    "wikitext2": Named({"train": "wikitext2/train_first1MB_raw.txt.gz", "dev": "wikitext2/valid.txt.gz"}),
    "text": Named({"all": "text/*.txt.gz"}),
    "shakespeare": Named({"all": "text/tinyshakespeare.txt.gz"}),
}


def names() -> tuple[str, ...]:
    """The names that can be used without a path."""
    return (*BUILT_IN, *NAMED)


def available(name: str, split: str | None = None) -> bool:
    """Whether the data can be loaded on this machine without the network."""
    try:
        return (name in BUILT_IN and split in (None, "all")) or bool(files_of(name, split)[0])
    except TautError:
        return False


def files_of(name: str, split: str | None, named: Mapping[str, Named] = NAMED) -> tuple[list[Path], str, str]:
    """The files of a name, the name of the source, and the split.

    If there are no files, the data is on the Hub and the source starts with ``hub:``. Raises TautError for an unknown
    name or split.
    """
    root = Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None
    if name in named:
        dataset = named[name]
        split = split or dataset.split
        if split not in dataset.files:
            raise TautError(f"data {name}: unknown split {split!r}: {nearest(split, dataset.files)}")
        files = sorted(root.glob(dataset.files[split])) if root else []
        if files or split in dataset.hub:
            return files, name if files else dataset.hub[split], split
        where = f"is not below {FOLDER}" if root else f"is needed, but {FOLDER} is not set"
        raise TautError(f"data {name}: {dataset.files[split]} {where}; set {FOLDER} to the folder that contains it")
    if name.startswith("hub:"):
        return [], name, split or "all"
    for path in (Path(name), root / name if root else Path(name)):
        if path.is_dir():
            files = sorted(path.glob(f"*.{split}.*")) if split else []
            if not files:
                splits = {file.name.split(".")[1] for file in path.glob("*.*.*")}
                raise TautError(f"data {name}: no files for this split in the folder: {nearest(split or '', splits)}")
            return files, f"folder {path.name}", split
        if path.is_file():
            if split not in (None, "all"):
                raise TautError(f"data {name}: a single file has no split {split!r}; leave split out")
            return [path], f"file {path.name}", "all"
    similar = difflib.get_close_matches(Path(name).name, [file.name for file in Path(name).parent.glob("*")], n=3)
    usable = names() if named is NAMED else named
    hint = nearest(Path(name).name, similar) if similar else nearest(name, usable)
    raise TautError(f"data {name}: no such name, file or folder: {hint}")


def read(path: Path) -> str:
    """The unchanged text of a file, as UTF-8, else as Latin-1 (older corpora). Raises TautError if it is unreadable."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise TautError(f"data {path.name}: not readable: {error}") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def rows_of(path: Path) -> tuple[tuple[str, ...] | None, list[tuple[str, ...]]]:
    """The header, if the first row is one, and the rows.

    Raises TautError for an empty file, and for a row whose width differs from the first row's.
    """
    content = read(path)
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".xz")), "")
    lines = [line.removesuffix("\r") for line in content.split("\n") if line.strip()]
    if suffix in (".jsonl", ".json"):
        return _objects(path, content if suffix == ".json" else "[" + ",".join(lines) + "]")
    if suffix == ".csv":
        rows = [tuple(row) for row in csv.reader(io.StringIO(content, newline="")) if row]
    elif suffix == ".tsv" or (lines and "\t" in lines[0]):
        rows = [tuple(line.split("\t")) for line in lines]
    else:
        # "label text", as in TREC and similar files.
        rows = [tuple(line.split(None, 1)) for line in lines]
    if not rows:
        raise TautError(f"data {path.name}: the file is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise TautError(f"data {path.name}: row {number} has {len(row)} columns, the first row has {len(rows[0])}")
    headers = {*TEXT_HEADERS, *LABEL_HEADERS, *PAIR_HEADERS, *SCORE_HEADERS}
    return (rows[0], rows[1:]) if headers & {cell.strip().lower() for cell in rows[0]} else (None, rows)


def _objects(path: Path, content: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    try:
        objects = json.loads(content)
        header = tuple(objects[0])
        return header, [tuple(str(item[key]) for key in header) for item in objects]
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise TautError(f"data {path.name}: expected JSON objects with the same keys: {error}") from None


def from_hub(name: str, split: str) -> Data:
    """The rows of ``hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN,COLUMN``, in the order of the Hub.

    Raises TautError for a name of another form, without the package datasets, and if the Hub fails.
    """
    pieces = name.split(":")
    folders = pieces[1].split("/") if len(pieces) == 4 else []
    if len(folders) not in (2, 3) or not all(folders):
        raise TautError(f"data {name}: expected hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN,COLUMN")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise TautError(f"data {name}: the Hub needs the package datasets: pip install 'taut[eval]'") from None
    try:
        table: Any = datasets.load_dataset("/".join(folders[:2]), *folders[2:], split=pieces[2])
        rows = tuple(tuple(str(row[column]) for column in pieces[3].split(",")) for row in table)
    except Exception as error:  # The Hub's client raises a dozen unrelated kinds; they all mean the same to the user.
        reason = " ".join(str(error).split())[:200]
        raise TautError(f"data {name}: the Hub failed ({type(error).__name__}: {reason}); set {FOLDER}") from None
    return Data(name, split, rows)

"""Named data in a fixed order, with a hash: built in, in a folder (the variable TAUT_DATA, or a path), or on the Hub.

A name is one of ``names()``, a file (``.tsv``, ``.csv``, ``.txt``, ``.jsonl``, ``.json``, each also ``.gz`` or
``.xz``) given as a path or relative to TAUT_DATA, a folder of ``*.SPLIT.*`` files, or
``hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN,COLUMN``. Tables come in the order of the hashes of their rows, so the first
rows are a fair sample whatever order the file had; running text keeps its order.
"""

import ast
import csv
import difflib
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import lzma
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from taut.core.errors import TautError, nearest

FOLDER = "TAUT_DATA"
TEXT_HEADERS = ("text", "sentence")
LABEL_HEADERS = ("label",)
PAIR_HEADERS = ("sentence1", "sentence2")
PAIR_COLUMNS = "sentence1,sentence2,label"
SCORE_HEADERS = ("score", "label", "similarity_score")
DOCUMENTED_MODULES = (
    *("argparse", "bisect", "calendar", "configparser", "contextlib", "csv", "dataclasses", "datetime", "decimal"),
    *("difflib", "doctest", "enum", "fileinput", "functools", "heapq", "imaplib", "inspect", "ipaddress", "locale"),
    *("mailbox", "mimetypes", "optparse", "os", "pathlib", "pickle", "platform", "random", "re", "selectors"),
    *("shutil", "smtplib", "socket", "statistics", "subprocess", "tarfile", "tempfile", "threading", "typing"),
)


@dataclass(frozen=True)
class Data:
    """Rows of text cells in a fixed order. ``source`` names where they come from and never holds a machine's path."""

    source: str
    split: str
    rows: tuple[tuple[str, ...], ...]

    @cached_property
    def sha256(self) -> str:
        """Of the rows as JSON lines; of the plain text itself where there is one cell."""
        if len(self.rows) == 1 and len(self.rows[0]) == 1:
            return hashlib.sha256(self.rows[0][0].encode()).hexdigest()
        return hashlib.sha256("\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows).encode()).hexdigest()

    def facts(self, items: int | None = None) -> dict[str, str]:
        """What a record keeps. ``items`` replaces the number of rows where a task counts something else."""
        count = len(self.rows) if items is None else items
        return {"source": self.source, "split": self.split, "items": str(count), "sha256": self.sha256}

    def head(self, limit: int | None) -> "Data":
        """The first ``limit`` rows; all of them for None."""
        return replace(self, rows=self.rows[:limit])

    def column(self, index: int) -> list[str]:
        return [row[index] for row in self.rows]

    def without(self, other: "Data") -> "Data":
        """The rows that share no sentence with ``other``: keeps evaluation text out of training. Single words (labels,
        scores) are no sentences."""
        taken = {sentence for row in other.rows for sentence in _sentences_of(row)}
        return replace(self, rows=tuple(row for row in self.rows if taken.isdisjoint(_sentences_of(row))))


@dataclass(frozen=True)
class Named:
    """A data set known by name: a file pattern per split, and the columns by header or by position (texts first)."""

    files: dict[str, str]
    columns: tuple[str | int, ...] = ()
    hub: dict[str, str] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The split to evaluate on when none is asked for."""
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
    "shakespeare": Named({"all": "text/tinyshakespeare.txt.gz"}),
}


def names() -> tuple[str, ...]:
    """The names that need no path."""
    return (*_BUILT_IN, *NAMED)


def available(name: str, split: str | None = None) -> bool:
    """Whether a name can be loaded here without the network."""
    try:
        return (name in _BUILT_IN and split in (None, "all")) or bool(_files(name, split)[0])
    except TautError:
        return False


def text(name: str, split: str | None = None, limit: int | None = None) -> Data:
    """Running text, one row of one cell, cut after ``limit`` characters. Raises TautError where there is none."""
    if name in _BUILT_IN:
        if split not in (None, "all"):
            raise TautError(f"data {name}: unknown split {split!r}: {nearest(split, ['all'])}")
        return Data(f"{name} (Python {platform.python_version()})", "all", ((_BUILT_IN[name]()[:limit],),))
    files, source, split = _files(name, split)
    if files:
        whole = "".join(_read(path) for path in files)
        return Data(source, split, ((whole[:limit],),))
    data = _hub(source, split)
    return replace(data, rows=(("\n".join(row[0] for row in data.rows)[:limit],),))


def paragraphs(name: str, split: str | None = None, limit: int | None = None) -> Data:
    """The parts of a running text between blank lines, one a row, in order, each with its whitespace made single.

    ``limit`` counts the characters of the text, as in ``text``.
    """
    data = text(name, split, limit)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", data.rows[0][0]))
    return replace(data, rows=tuple((block,) for block in blocks if block))


def calibration_texts(name: str | Path) -> list[str]:
    """Paragraphs to calibrate with, none with a sentence of the built-in evaluation text. ``builtin``: 500 paragraphs
    of Python's docstrings in hashed order, about 70,000 characters; else any running text, whole and in its order."""
    if str(name) == "builtin":
        return [row[0] for row in hashed(paragraphs("python_docstrings").rows)[:500]]
    return paragraphs(str(name)).without(paragraphs("python_topics")).column(0)


def labelled(name: str, split: str | None = None, columns: str | None = None) -> Data:
    """Rows (text, label) in hashed order. ``columns``: ``"TEXT,LABEL"`` by header or by position from 0.

    Without ``columns`` a header with ``label`` and ``text`` or ``sentence`` decides, or, of two columns, the one with
    fewer distinct values is the label. Raises TautError otherwise.
    """
    return _table(name, split, columns, 2, _guess_labelled, "TEXT,LABEL")


def scored_pairs(name: str, split: str | None = None, columns: str | None = None) -> Data:
    """Rows (sentence, sentence, score) in hashed order. ``columns`` as in ``labelled``, for three columns.

    Without ``columns`` a header decides, or, of three columns, the one where every value is a number is the score.
    Raises TautError otherwise, and where a score is not a number.
    """
    data = _table(name, split, columns, 3, _guess_scored, "SENTENCE1,SENTENCE2,SCORE")
    for row in data.rows:
        if not _is_number(row[2]):
            raise TautError(f"data {name}: the score {row[2]!r} of {row[0][:40]!r} is not a number")
    return data


def hashed(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Rows in the order of their hashes: fixed, and as good as random."""
    return tuple(sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest()))


def sentences(paragraph: str) -> list[str]:
    """Cut after a full stop, question or exclamation mark that a capital, a quotation mark or a bracket follows."""
    return re.split(r"(?<=[.!?])\s+(?=[\"“*(A-Z])", paragraph.strip())


def _sentences_of(row: tuple[str, ...]) -> list[str]:
    return [sentence for cell in row for sentence in (cell.strip(), *sentences(cell)) if " " in sentence]


@cache
def _python_topics() -> str:
    """The reference pages behind Python's ``help``: about half a megabyte of English, without repeated blocks."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise TautError("data python_topics: this Python comes without pydoc_data; use a full installation") from None
    blocks = (block.strip("\n") for key in sorted(topics) for block in re.split(r"\n[ \t]*\n", topics[key]))
    return "\n\n".join(dict.fromkeys(block for block in blocks if block.strip())) + "\n"


@cache
def _python_docstrings() -> str:
    """Docstrings of the standard library, without a sentence of ``python_topics``: text for calibration."""
    blocks: dict[str, None] = {}
    for module in DOCUMENTED_MODULES:
        for docstring in _docstrings(module):
            blocks |= dict.fromkeys(" ".join(block.split()) for block in re.split(r"\n\s*\n", docstring))
    if not blocks:
        raise TautError("data python_docstrings: this Python comes without its sources; use a full installation")
    found = Data("", "", tuple((block,) for block in blocks if len(block.split()) >= 8))
    return "\n\n".join(found.without(paragraphs("python_topics")).column(0)) + "\n"


def _docstrings(module: str) -> Iterator[str]:
    """Read from the source: importing everything would be slow and have effects. Nothing for a module not here."""
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, ValueError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node) or "")


_BUILT_IN: dict[str, Callable[[], str]] = {"python_topics": _python_topics, "python_docstrings": _python_docstrings}


def _files(name: str, split: str | None) -> tuple[list[Path], str, str]:
    """The files of a name, what to call the source, and the split. No files and a ``hub:`` source: on the Hub."""
    root = Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None
    if name in NAMED:
        known = NAMED[name]
        split = split or known.split
        if split not in known.files:
            raise TautError(f"data {name}: unknown split {split!r}: {nearest(split, known.files)}")
        files = sorted(root.glob(known.files[split])) if root else []
        if files or split in known.hub:
            return files, name if files else known.hub[split], split
        where = f"is not below {FOLDER}" if root else f"is needed, but {FOLDER} is not set"
        raise TautError(f"data {name}: {known.files[split]} {where}; set {FOLDER} to the folder that holds it")
    if name.startswith("hub:"):
        return [], name, split or "all"
    for path in (Path(name), root / name if root else Path(name)):
        if path.is_dir():
            files = sorted(path.glob(f"*.{split}.*")) if split else []
            if not files:
                splits = {file.name.split(".")[1] for file in path.glob("*.*.*")}
                raise TautError(f"data {name}: a folder needs a split with files: {nearest(split or '', splits)}")
            return files, f"folder {path.name}", split
        if path.is_file():
            if split not in (None, "all"):
                raise TautError(f"data {name}: a single file has no split {split!r}; leave split out")
            return [path], f"file {path.name}", "all"
    beside = difflib.get_close_matches(Path(name).name, [file.name for file in Path(name).parent.glob("*")], n=3)
    hint = nearest(Path(name).name, beside) if beside else nearest(name, names())
    raise TautError(f"data {name}: no such name, file or folder: {hint}")


def _read(path: Path) -> str:
    """The text of a file as it is; UTF-8, else Latin-1 (older corpora)."""
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


def _rows(path: Path) -> tuple[tuple[str, ...] | None, list[tuple[str, ...]]]:
    """Header, if the first row is one, and rows. Raises TautError naming the row that has another width."""
    content = _read(path)
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".xz")), "")
    lines = [line.removesuffix("\r") for line in content.split("\n") if line.strip()]
    if suffix in (".jsonl", ".json"):
        return _objects(path, content if suffix == ".json" else "[" + ",".join(lines) + "]")
    if suffix == ".csv":
        rows = [tuple(row) for row in csv.reader(io.StringIO(content, newline="")) if row]
    elif suffix == ".tsv" or (lines and "\t" in lines[0]):
        rows = [tuple(line.split("\t")) for line in lines]
    else:
        # "label text", as in TREC and its relatives.
        rows = [tuple(line.split(None, 1)) for line in lines]
    if not rows:
        raise TautError(f"data {path.name}: the file is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise TautError(f"data {path.name}: row {number} has {len(row)} columns, the first row has {len(rows[0])}")
    known = {*TEXT_HEADERS, *LABEL_HEADERS, *PAIR_HEADERS, *SCORE_HEADERS}
    return (rows[0], rows[1:]) if known & {cell.strip().lower() for cell in rows[0]} else (None, rows)


def _objects(path: Path, content: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    try:
        objects = json.loads(content)
        header = tuple(objects[0])
        return header, [tuple(str(item[key]) for key in header) for item in objects]
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise TautError(f"data {path.name}: expected JSON objects with the same keys: {error}") from None


Guess = Callable[[tuple[str, ...] | None, list[tuple[str, ...]]], tuple[int, ...] | None]


def _table(name: str, split: str | None, columns: str | None, count: int, guess: Guess, roles: str) -> Data:
    if name in _BUILT_IN:
        raise TautError(f"data {name}: running text, not a table {roles}: {nearest(name, NAMED)}")
    files, source, split = _files(name, split)
    if not files:
        data = _hub(source, split)
        if data.rows and len(data.rows[0]) != count:
            raise TautError(f"data {source}: expected the columns {roles}")
        return replace(data, rows=hashed(data.rows))
    wanted: Sequence[str | int] = NAMED[name].columns if name in NAMED else ()
    if columns is not None:
        wanted = [int(key) if key.isdigit() else key for key in (piece.strip() for piece in columns.split(","))]
    chosen: list[tuple[str, ...]] = []
    for path in files:
        header, rows = _rows(path)
        indices = _indices(path, header, len(rows[0]) if rows else 0, wanted) if wanted else guess(header, rows)
        if indices is None or len(indices) != count:
            raise TautError(f"data {path.name}: cannot tell the columns; give columns as {roles}, such as 0,1")
        chosen += [tuple(row[index].strip() for index in indices) for row in rows]
    return Data(source, split, hashed(chosen))


def _indices(
    path: Path, header: tuple[str, ...] | None, width: int, wanted: Sequence[str | int]
) -> tuple[int, ...] | None:
    lowered = [cell.strip().lower() for cell in header or ()]
    for key in wanted:
        if isinstance(key, str) and key.lower() not in lowered:
            raise TautError(f"data {path.name}: no column {key!r}: {nearest(key, lowered)}")
        if isinstance(key, int) and key >= width:
            raise TautError(f"data {path.name}: no column {key}: {nearest(str(key), map(str, range(width)))}")
    return tuple(key if isinstance(key, int) else lowered.index(key.lower()) for key in wanted)


def _guess_labelled(header: tuple[str, ...] | None, rows: list[tuple[str, ...]]) -> tuple[int, ...] | None:
    if header:
        return _by_header(header, TEXT_HEADERS, LABEL_HEADERS)
    if not rows or len(rows[0]) != 2:
        return None
    return (1, 0) if len({row[0] for row in rows}) <= len({row[1] for row in rows}) else (0, 1)


def _guess_scored(header: tuple[str, ...] | None, rows: list[tuple[str, ...]]) -> tuple[int, ...] | None:
    if header:
        return _by_header(header, PAIR_HEADERS[:1], PAIR_HEADERS[1:], SCORE_HEADERS)
    if not rows or len(rows[0]) != 3:
        return None
    numeric = [index for index in range(3) if all(_is_number(row[index]) for row in rows)]
    return (*(index for index in range(3) if index != numeric[0]), numeric[0]) if len(numeric) == 1 else None


def _by_header(header: tuple[str, ...], *roles: tuple[str, ...]) -> tuple[int, ...] | None:
    lowered = [cell.strip().lower() for cell in header]
    found = [next((lowered.index(choice) for choice in choices if choice in lowered), None) for choices in roles]
    return None if None in found else tuple(found)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*", cell) is not None


def _hub(name: str, split: str) -> Data:
    """Rows of ``hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN,COLUMN``, in the order of the Hub."""
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
    except Exception as error:  # The Hub's client raises a dozen unrelated kinds; all mean the same to the user.
        reason = " ".join(str(error).split())[:200]
        raise TautError(f"data {name}: the Hub gave nothing ({type(error).__name__}: {reason}); set {FOLDER}") from None
    return Data(name, split, rows)

"""Built-in data: text that every Python installation contains."""

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from taut.core.errors import TautError
from taut.data.rows import Data, blocks

DOCUMENTED_MODULES = (
    *("argparse", "bisect", "calendar", "configparser", "contextlib", "csv", "dataclasses", "datetime", "decimal"),
    *("difflib", "doctest", "enum", "fileinput", "functools", "heapq", "imaplib", "inspect", "ipaddress", "locale"),
    *("mailbox", "mimetypes", "optparse", "os", "pathlib", "pickle", "platform", "random", "re", "selectors"),
    *("shutil", "smtplib", "socket", "statistics", "subprocess", "tarfile", "tempfile", "threading", "typing"),
)


@cache
def _python_topics() -> str:
    """The reference pages behind Python's ``help``: about half a megabyte of English, without repeated blocks."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise TautError("data python_topics: this Python has no pydoc_data; use a full installation") from None
    parts = (block.strip("\n") for key in sorted(topics) for block in re.split(r"\n[ \t]*\n", topics[key]))
    return "\n\n".join(dict.fromkeys(part for part in parts if part.strip())) + "\n"


@cache
def _python_docstrings() -> str:
    """Docstrings of the standard library, none with a sentence of ``python_topics``: text for calibration."""
    docstrings: dict[str, None] = {}
    for module in DOCUMENTED_MODULES:
        for docstring in _docstrings(module):
            docstrings |= dict.fromkeys(blocks(docstring))
    if not docstrings:
        raise TautError("data python_docstrings: this Python has no source files; use a full installation")
    topics = Data("", "", tuple((block,) for block in blocks(_python_topics())))
    candidates = Data("", "", tuple((block,) for block in docstrings if len(block.split()) >= 8))
    return "\n\n".join(candidates.without(topics).column(0)) + "\n"


def _docstrings(module: str) -> Iterator[str]:
    """The docstrings of a module, from its source: importing it would be slow and could have side effects.

    Yields nothing if the module is missing or its source cannot be read.
    """
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, ValueError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node) or "")


BUILT_IN: dict[str, Callable[[], str]] = {"python_topics": _python_topics, "python_docstrings": _python_docstrings}

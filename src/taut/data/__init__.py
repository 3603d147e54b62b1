"""Named data in a fixed order, with a hash: built in, in a folder (the variable TAUT_DATA, or a path), or on the Hub.

A name is one of these:

* one of ``names()``,
* a file (``.tsv``, ``.csv``, ``.txt``, ``.jsonl``, ``.json``, each also ``.gz`` or ``.xz``), as a path or relative to
  TAUT_DATA,
* a folder of ``*.SPLIT.*`` files,
* ``hub:OWNER/NAME[/CONFIG]:SPLIT:COLUMN,COLUMN``.

The rows of a table are sorted by their hashes, so the first rows are a fair sample whatever the order of the file.
Running text keeps its order.
"""

from taut.data.files import FOLDER, NAMED, available, names
from taut.data.questions import QUESTIONS, questions
from taut.data.rows import Data, hashed, sentences
from taut.data.tables import labelled, scored_pairs
from taut.data.texts import calibration_texts, documents, paragraphs, text

__all__ = [
    "FOLDER",
    "NAMED",
    "QUESTIONS",
    "Data",
    "available",
    "calibration_texts",
    "documents",
    "hashed",
    "labelled",
    "names",
    "paragraphs",
    "questions",
    "scored_pairs",
    "sentences",
    "text",
]

"""Rows of text in a fixed order, with a hash."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Data:
    """Rows of text cells in a fixed order. ``source`` names their origin and never contains a local path."""

    source: str
    split: str
    rows: tuple[tuple[str, ...], ...]

    @cached_property
    def sha256(self) -> str:
        """The hash of the rows as JSON lines. For a single cell, the hash of its plain text."""
        if len(self.rows) == 1 and len(self.rows[0]) == 1:
            return hashlib.sha256(self.rows[0][0].encode()).hexdigest()
        return hashlib.sha256("\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows).encode()).hexdigest()

    def facts(self, items: int | None = None) -> dict[str, str]:
        """The facts for a record. ``items`` replaces the number of rows if a task counts something else."""
        count = len(self.rows) if items is None else items
        return {"source": self.source, "split": self.split, "items": str(count), "sha256": self.sha256}

    def head(self, limit: int | None) -> "Data":
        """The first ``limit`` rows; all of them for None."""
        return replace(self, rows=self.rows[:limit])

    def column(self, index: int) -> list[str]:
        return [row[index] for row in self.rows]

    def without(self, other: "Data") -> "Data":
        """The rows that share no sentence with ``other``: keeps evaluation text out of training.

        Single words (labels, scores) do not count as sentences.
        """
        taken = {sentence for row in other.rows for sentence in _sentences_of(row)}
        return replace(self, rows=tuple(row for row in self.rows if taken.isdisjoint(_sentences_of(row))))


def hashed(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Sort rows by their hashes: a fixed order that is as good as random."""
    return tuple(sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest()))


def blocks(text: str) -> list[str]:
    """The parts of a text between blank lines. Each run of whitespace in them becomes one space."""
    parts = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in parts if block]


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences.

    A sentence ends at a full stop, question mark or exclamation mark. A capital, a quotation mark, an asterisk or a
    bracket must follow.
    """
    return re.split(r"(?<=[.!?])\s+(?=[\"“*(A-Z])", paragraph.strip())


def _sentences_of(row: tuple[str, ...]) -> list[str]:
    return [sentence for cell in row for sentence in (cell.strip(), *sentences(cell)) if " " in sentence]

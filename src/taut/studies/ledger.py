"""The ledger: a folder with one JSON file per trial, written whole or not at all, and never edited."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from taut.core.errors import TautError
from taut.core.record import Record
from taut.core.strict import first_problem

UNREADABLE_LEASE_SECONDS = 10.0
"""A lease is first created, then filled. If it is still unreadable after this time, its process is taken to be gone."""


class Ledger:
    """The records in the folder ``path``. Reading a missing folder finds no records; writing creates it.

    A damaged record stays where it is. ``damaged`` names it, all other methods skip it, and its trial may be written
    again beside it (``ID-2.json``). Raises TautError if ``path`` is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise TautError(f"{self.path}: a ledger is a folder, but this is a file; name another place")

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r})"

    def records(self) -> list[Record]:
        """All readable records, oldest first."""
        records = [record for _, record in self._read("*.json") if isinstance(record, Record)]
        return sorted(records, key=lambda record: (record.started, record.id))

    def damaged(self) -> list[tuple[Path, str]]:
        """The files that do not hold a record of this version, each with the reason."""
        return [(path, record) for path, record in self._read("*.json") if isinstance(record, str)]

    def check_not_empty(self) -> None:
        """Raises TautError for a ledger without any file, readable or damaged."""
        if not any(self.path.glob("*.json")):
            raise TautError(f"{self.path}: no records found; run `taut compare` first or name another ledger")

    def has(self, key: str) -> bool:
        """Whether this trial has a readable record."""
        return any(isinstance(record, Record) for _, record in self._read(f"{key}*.json"))

    def write(self, record: Record) -> Path:
        """Write one new record.

        Raises TautError if its trial already has one, if it could not be read again, or if the folder is not writable.
        """
        if self.has(record.id):
            raise TautError(
                f"{self.path}: trial {record.id} ({record.trial}) has a record already; none is overwritten"
            )
        text = record.model_dump_json(indent=1) + "\n"
        if isinstance(reason := _check(text), str):
            raise TautError(f"the record of {record.trial} would not be readable again: {reason}")
        path, number = self.path / f"{record.id}.json", 1
        while path.exists():
            number += 1
            path = self.path / f"{record.id}-{number}.json"
        # The name of the draft is fixed, so that a draft left by a killed run is overwritten by the next one.
        draft = self.path / f".{record.id}.draft"
        try:
            self._make()
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            _sync_folder(self.path)
        except OSError as error:
            raise TautError(f"{path}: cannot write the record: {error.strerror or error}") from None
        return path

    @contextmanager
    def lease(self, key: str) -> Iterator[str | None]:
        """Hold the trial ``key`` for this process. Yields None if this process holds it, else the holder in words.

        A lease whose process is gone is taken over. A lease only saves work. The ledger stays sound because ``write``
        refuses a second record.
        """
        path = self.path / f"{key}.lease"
        holder = self._claim(path)
        try:
            yield holder
        finally:
            if holder is None:
                path.unlink(missing_ok=True)

    def _claim(self, path: Path) -> str | None:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "start": psutil.Process().create_time()}
        try:
            self._make()
            while True:
                try:
                    with path.open("x", encoding="utf-8") as file:
                        json.dump(me, file)
                    return None
                except FileExistsError:
                    if (holder := _holder(path)) is not None:
                        return holder
                # If two runners find the same dead lease, only one moves it away. A live lease is put back.
                aside = path.with_name(f".{path.name}.{me['pid']}")
                try:
                    os.replace(path, aside)
                    if (holder := _holder(aside)) is not None:
                        os.replace(aside, path)
                        return holder
                    aside.unlink()
                except FileNotFoundError:
                    continue
        except OSError as error:
            raise TautError(f"{self.path}: the ledger is not writable: {error.strerror or error}") from None

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def _read(self, pattern: str) -> Iterator[tuple[Path, Record | str]]:
        for path in sorted(self.path.glob(pattern)):
            if not path.name.startswith("."):
                yield path, _parse(path)


def _parse(path: Path) -> Record | str:
    """The record in a file, or why there is none."""
    try:
        record = _check(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        return f"not text: {error}"
    if isinstance(record, Record) and re.fullmatch(rf"{re.escape(record.id)}(-\d+)?", path.stem) is None:
        return f"the file is named {path.stem} but holds the record {record.id}"
    return record


def _check(text: str) -> Record | str:
    """The record in a text, or why there is none. A NaN among the samples is one reason: JSON has no NaN."""
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        return first_problem(error, "content")


def _holder(path: Path) -> str | None:
    """Who holds a lease; None if nobody does any more."""
    try:
        lease: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pid, host, start = int(lease["pid"]), str(lease["host"]), float(lease["start"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        age = time.time() - path.stat().st_mtime if path.exists() else UNREADABLE_LEASE_SECONDS
        return "a runner that is just starting" if age < UNREADABLE_LEASE_SECONDS else None
    if host != socket.gethostname():
        return f"process {pid} on {host} (if it is dead, delete {path})"
    try:
        # A process id is used again after a while; the id and the start time together are not.
        alive = abs(psutil.Process(pid).create_time() - start) < 1.0
    except psutil.NoSuchProcess:
        alive = False
    except psutil.AccessDenied:
        alive = True
    return f"process {pid} on this machine" if alive else None


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut, on systems that can sync a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)

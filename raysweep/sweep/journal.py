"""The journal of a sweep's Optuna studies: a file with one record of Optuna in each line.

Optuna's own backend for files passes over an incomplete last line and appends to it, so that the file can never be read
again. It also waits for a lock that a killed process has left. Here the sweep's lock is held, so no other lock is
needed: an incomplete last line is cut off before the journal is opened, and after a write that failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from raysweep.errors import DataError, ResourceError
from raysweep.storage.copies import location

STATE_OF_TRIAL = 6  # the operation that starts or ends a trial, in Optuna's journals
TAIL_BYTES = 2**16  # read at a time to find the last line


class JournalFile(BaseJournalBackend):
    """Reads and appends records; each sync reads only what was appended since.

    Args:
        path: the file; it exists, and its last line is complete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = (0, 0)  # number of the next record to read, and the byte at which it begins
        self._torn_at: int | None = None  # length before a write that failed

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the records from a number on.

        Raises:
            DataError: a line is not a record.
        """
        number, position = self._next if self._next[0] <= log_number_from else (0, 0)
        with self._path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):  # another process is still writing it
                    return
                record = parse_record(line)
                if record is None:
                    raise DataError(_describe_bad_line(self._path, number + 1, line))
                number, position = number + 1, position + len(line)
                self._next = number, position
                if number > log_number_from:
                    yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends records: all of them, or none.

        Raises:
            ResourceError: the file cannot be written to; the disk may be full.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        handle = None
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            if self._torn_at is not None:
                os.ftruncate(handle, self._torn_at)
            self._torn_at = os.fstat(handle).st_size
            _write_all(handle, lines)
            # A killed process loses nothing. Only a machine that fails loses what is not on the disk yet.
            if any(log.get("op_code") == STATE_OF_TRIAL for log in logs):
                os.fsync(handle)
            self._torn_at = None
        except OSError as error:
            if handle is not None and self._torn_at is not None:
                _truncate_if_possible(handle, self._torn_at)
            raise ResourceError(
                f"{location(self._path)}: cannot be written to ({error.strerror or error}); nothing is lost: mend "
                "that, and the same command goes on from here"
            ) from error
        finally:
            if handle is not None:
                os.close(handle)


def open_journal(path: Path, warn: Callable[[str], None]) -> JournalStorage:
    """Opens the journal, which is created if missing. The caller holds the sweep's lock.

    Args:
        path: the file.
        warn: is told what was mended.

    Raises:
        DataError: a line other than the last is not a record.
        ResourceError: the file cannot be created or read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        for left_behind in path.parent.glob(f"{path.name}.lock*"):  # by a killed process of an earlier version
            left_behind.unlink(missing_ok=True)
        num_bytes = cut_incomplete_line(path)
    except OSError as error:
        raise ResourceError(f"{location(path)}: cannot be used ({error.strerror or error})") from error
    if num_bytes:
        warn(
            f"{location(path)}: its last line was incomplete and is cut off ({num_bytes} bytes); what it said is done "
            "again"
        )
    try:
        return JournalStorage(JournalFile(path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(f"{location(path)}: Optuna cannot read it ({reason}); {_remedy()}") from error


def cut_incomplete_line(path: Path) -> int:
    """Cuts a file after its last complete record, if only its last line is incomplete; returns the number of bytes."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _start_of_last_line(file, size)
        file.seek(start)
        last = file.read()
        if not last or (last.endswith(b"\n") and parse_record(last) is not None):
            return 0
        file.truncate(start)
        return size - start


def _start_of_last_line(file: Any, size: int) -> int:
    end = size - 1  # a line break at the very end belongs to the last line
    while end > 0:
        begin = max(0, end - TAIL_BYTES)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return int(begin + found + 1)
        end = begin
    return 0


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns a record of Optuna; None if the line is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("op_code"), int) else None


def _describe_bad_line(path: Path, number: int, line: bytes) -> str:
    shown = line[:60].decode(errors="replace").strip()
    return f"{location(path)}: line {number} is not a record of Optuna (it begins with '{shown}'); {_remedy(number)}"


def _remedy(number: int | None = None) -> str:
    begin_anew = "move the file away to begin this sweep's trials anew"
    if number is None:
        return begin_anew
    return f"keep only its first {number - 1} lines to run the trials after them again, or {begin_anew}"


def _write_all(handle: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _truncate_if_possible(handle: int, size: int) -> None:
    try:
        os.ftruncate(handle, size)
    except OSError:
        return  # the next write, or the next sweep, cuts it

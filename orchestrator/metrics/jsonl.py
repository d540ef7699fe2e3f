"""The record of a run: append-only files of JSON lines, and their readers. Standard library only.

One object per line. JSON cannot represent non-finite numbers, so NaN and the infinities are written as the strings
"NaN", "Infinity" and "-Infinity", and every reader here turns exactly these strings back into numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, cast

from orchestrator.errors import RunFolderError

Row: TypeAlias = dict[str, object]
"""One line of a record."""

_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_TAIL_BYTES = 1 << 16


class RecordFile:
    """The one writer of a record. A row is one `os.write` of a whole line to a file in append mode, so a reader sees it
    at once.

    A file has one writer at a time. A torn line left by a killed writer is repaired when the next one opens the file.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _repair_last_line(self._descriptor)

    def append(self, row: Mapping[str, object]) -> None:
        """Write one line. On failure (a full disk) the file is left as it was, and the OSError goes to the caller."""
        line = encode(row)
        start = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:
                # Half a line would damage the row that follows it.
                os.ftruncate(self._descriptor, start)
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tail:
    """A reader that returns the rows added since its last call.

    Incomplete lines wait for the next call. A complete line that is no object is skipped: a follower shows what it can,
    and `read_rows` names the line. A missing file has no rows.
    """

    def __init__(self, path: Path, *, from_offset: int = 0) -> None:
        self.offset = from_offset
        self._path = path

    def poll(self, *, until: int | None = None) -> list[Row]:
        """The rows of all lines completed since the last call (and before the offset `until`)."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self.offset)
                data = file.read(-1 if until is None else max(0, until - self.offset))
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        rows = (decode(line) for line in whole.splitlines())
        return [row for row in rows if row is not None]


def follow(path: Path, *, from_offset: int = 0, stop: Callable[[], bool], poll_seconds: float = 0.2) -> Iterator[Row]:
    """The rows of a growing file, waiting for more until `stop()`; rows completed before `stop()` turned true are still
    returned.
    """
    tail = Tail(path, from_offset=from_offset)
    while True:
        stopping = stop()
        yield from tail.poll()
        if stopping:
            return
        time.sleep(poll_seconds)


def read_rows(path: Path) -> list[Row]:
    """All rows of a record; a missing file has none, and a torn last line is omitted.

    Raises RunFolderError naming the line if any other line is not a JSON object.
    """
    rows, damaged = readable_rows(path)
    if damaged:
        raise RunFolderError(f"{damaged[0]}; delete that line to continue")
    return rows


def readable_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows that can be read, and a sentence about each other line; like `read_rows`, for commands that only show a
    run.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    rows: list[Row] = []
    damaged: list[str] = []
    for number, line in enumerate(lines, start=1):
        row = decode(line)
        if row is not None:
            rows.append(row)
        # A last line without its line feed is still being written.
        elif line and number < len(lines):
            damaged.append(f"{path}:{number} is not a JSON object: {line[:60]!r}")
    return rows, damaged


def last_attempt_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows that count, by step: for each step those of its last execution (its training and its evaluation row)."""
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        if "step" not in row:
            continue
        kept = by_step.setdefault(step_of(row), [])
        if kept and _turn(kept[0]) < _turn(row):
            kept.clear()
        if not kept or _turn(kept[0]) == _turn(row):
            kept.append(row)
    return [row for step in sorted(by_step) for row in by_step[step]]


def step_of(row: Row) -> int:
    """The optimizer step of a row; only for rows that have one."""
    step = row["step"]
    assert isinstance(step, int), row
    return step


def attempt_of(row: Row) -> int:
    """The attempt that wrote the row; 0 if not recorded."""
    attempt = row.get("attempt", 0)
    assert isinstance(attempt, int), row
    return attempt


def number_of(row: Row, key: str) -> float | None:
    """The number under `key`; None where the row has none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def encode(row: Mapping[str, object]) -> bytes:
    """One line with its line feed, in strict JSON."""
    try:
        text = json.dumps(row, allow_nan=False, ensure_ascii=False)
    except ValueError:
        text = json.dumps(_names_for_not_finite(row), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def decode(line: bytes) -> Row | None:
    """The row of one line; None where the line is not a JSON object."""
    try:
        value: object = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return {key: _numbers_for_names(item) for key, item in cast(Row, value).items()}


def _turn(row: Row) -> tuple[int, int]:
    """Attempt, and rollbacks within the run, which order repeated executions of a step."""
    rollbacks = row.get("rollbacks", 0)
    assert isinstance(rollbacks, int), row
    return attempt_of(row), rollbacks


def _names_for_not_finite(value: object) -> object:
    if isinstance(value, float):
        return next((word for word, number in _NOT_FINITE.items() if repr(number) == repr(value)), value)
    if isinstance(value, Mapping):
        return {key: _names_for_not_finite(item) for key, item in cast(Mapping[str, object], value).items()}
    if isinstance(value, list | tuple):
        return [_names_for_not_finite(item) for item in cast(list[object], value)]
    return value


def _numbers_for_names(value: object) -> object:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _numbers_for_names(item) for key, item in cast(Row, value).items()}
    if isinstance(value, list):
        return [_numbers_for_names(item) for item in cast(list[object], value)]
    return value


def _repair_last_line(descriptor: int) -> None:
    """End a last line that lacks only its line feed; cut off one that is torn."""
    size = os.fstat(descriptor).st_size
    last = _last_line(descriptor, size)
    if not last:
        return
    if decode(last) is None:
        os.ftruncate(descriptor, size - len(last))
    else:
        os.write(descriptor, b"\n")


def _last_line(descriptor: int, size: int) -> bytes:
    """The bytes after the last line feed of the file."""
    tail = b""
    while len(tail) < size and b"\n" not in tail:
        length = min(_TAIL_BYTES, size - len(tail))
        tail = os.pread(descriptor, length, size - len(tail) - length) + tail
    return tail[tail.rfind(b"\n") + 1 :]

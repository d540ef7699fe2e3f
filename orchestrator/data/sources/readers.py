"""Reads rows of JSONL, JSON, CSV, Parquet and Arrow files, each with its location.

Must not import torch or datasets.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from orchestrator.data.sources.columnar import arrow_rows, parquet_count, parquet_rows
from orchestrator.errors import DataError

FileKind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"]
SUFFIXES: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}
_NO_BLANK = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Replaces a row that could not be read: what was found, what was expected."""

    found: str
    expected: str


def file_kind(path: Path) -> FileKind | None:
    """The kind of a file by its name, ignoring `.gz`; a `.json` file with one row per line counts as jsonl."""
    name = path.name.removesuffix(".gz")
    kind = SUFFIXES.get(Path(name).suffix.lower())
    if kind == "json":
        with open_bytes(path) as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        return "json" if not start.startswith(b"{") or _is_one_object(path) else "jsonl"
    return kind


def _is_one_object(path: Path) -> bool:
    """Whether a file that starts with { is one object over many lines (and not an object per line)."""
    with open_bytes(path) as file:
        first = file.readline()
    try:
        json.loads(first)
    except ValueError:
        return True
    return False


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed if its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def read_rows(path: Path, kind: FileKind) -> Iterator[tuple[int, object]]:
    """(number, row or Unreadable) of one file; `position` says what the number means. Raises DataError if the file as a
    whole is broken.
    """
    readers = {
        "jsonl": _jsonl,
        "json": _json,
        "csv": _csv,
        "tsv": _csv,
        "parquet": parquet_rows,
        "arrow": arrow_rows,
        "txt": _text,
    }
    try:
        yield from readers[kind](path)
    except (OSError, EOFError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def position(path: Path | str, number: int) -> str:
    """Where a row is, as FILE:LINE (of Parquet and Arrow files FILE:ROW); numbers below zero count the rows of a line."""
    return f"{path}:{number}" if number > 0 else f"{path} row {-number}"


def parse_line(line: bytes) -> object:
    """The object of one JSONL line, or Unreadable."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 (byte {error.start})", "a JSON object")
    except ValueError as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Unreadable(f"is not JSON ({message}{column})", "a JSON object")
    except RecursionError:
        return Unreadable("is nested too deeply", "a JSON object")


def _jsonl(path: Path) -> Iterator[tuple[int, object]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            stripped = line.strip() if number > 1 else line.removeprefix(b"\xef\xbb\xbf").strip()
            if stripped:
                yield number, parse_line(stripped)


def _json(path: Path) -> Iterator[tuple[int, object]]:
    with open_bytes(path) as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        value: Any = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        lists: list[Any] = [item for item in cast("dict[str, Any]", value).values() if isinstance(item, list)]
        if len(lists) != 1:
            raise DataError(f"{path} holds one object, a list of rows expected (or an object with one list)")
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"{path} holds a single value, a list of rows expected")
    placed = list(_rows_with_lines(content.decode(json.detect_encoding(content))))
    # In a file on one line, line numbers do not locate a row: its rows are numbered below zero (see `position`).
    has_lines = len({line for line, _ in placed}) == len(placed) > 1
    yield from ((line if has_lines else -number, row) for number, (line, row) in enumerate(placed, start=1))


def _rows_with_lines(text: str) -> Iterator[tuple[int, object]]:
    """(line, row) of the list in a valid JSON file: the file's own, or the one inside its object."""
    decoder = json.JSONDecoder()
    here = _after_blanks(text, 0)
    while text[here] != "[":  # within the object: past a key, and past a value that is no list
        _, here = decoder.raw_decode(text, _after_blanks(text, here + 1))
        here = _after_blanks(text, _after_blanks(text, here) + 1)
        if text[here] != "[":
            _, here = decoder.raw_decode(text, here)
            here = _after_blanks(text, here)
    line, counted = 1, 0
    here = _after_blanks(text, here + 1)
    while text[here] != "]":
        line, counted = line + text.count("\n", counted, here), here
        row, here = decoder.raw_decode(text, here)
        yield line, row
        here = _after_blanks(text, here)
        here = _after_blanks(text, here + 1) if text[here] == "," else here


def _after_blanks(text: str, start: int) -> int:
    """Index of the next character that is not JSON whitespace."""
    found = _NO_BLANK.search(text, start)
    assert found is not None, "the text is valid JSON"
    return found.start()


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in path.name else ","
    with open_bytes(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, None) or []
            while True:
                line = reader.line_num + 1  # the next row begins here; quoted fields may take it over several lines
                cells = next(reader, None)
                if cells is None:
                    return
                if len(cells) == len(header):
                    yield line, dict(zip(header, cells, strict=True))
                elif cells:
                    yield line, Unreadable(f"has {len(cells)} cells", f"{len(header)} as in the header")
        except csv.Error as error:
            raise DataError(f"{path}:{line} cannot be read: {error}") from error


def _text(path: Path) -> Iterator[tuple[int, object]]:
    with open_bytes(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def count_rows(path: Path, kind: FileKind) -> int:
    """Number of rows of a file, without parsing if its kind allows; blank lines do not count."""
    if kind in ("jsonl", "txt"):
        return _count_lines(path)
    if kind == "parquet":
        return parquet_count(path)
    return sum(1 for _ in read_rows(path, kind))


def _count_lines(path: Path) -> int:
    with open_bytes(path) as file:
        return sum(1 for line in file if not line.isspace())

"""Rows out of JSONL, JSON, CSV, Parquet and Arrow files, each with its place; must not import torch or datasets."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from orchestrator.dataset.columnar import arrow_rows, parquet_count, parquet_rows
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


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands in place of a row that could not be read: what was found, what was expected."""

    found: str
    expected: str


def file_kind(path: Path) -> FileKind | None:
    """The kind of a file by its name, `.gz` aside; a `.json` file that holds a line per row counts as jsonl."""
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
    """The file's bytes, decompressed where its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def read_rows(path: Path, kind: FileKind) -> Iterator[tuple[int, object]]:
    """(line or row number from 1, row or Unreadable) of one file. Raises DataError where the file as a whole is broken."""
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


def place_word(kind: FileKind) -> str:
    """What a row's number counts: a line of the file or a row."""
    return "line" if kind in ("jsonl", "txt") else "row"


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
    yield from enumerate(cast("list[object]", value), start=1)


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in path.name else ","
    with open_bytes(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            return
        for number, cells in enumerate(reader, start=1):
            if len(cells) == len(header):
                yield number, dict(zip(header, cells, strict=True))
            elif cells:
                yield number, Unreadable(f"has {len(cells)} cells", f"{len(header)} as in the header")


def _text(path: Path) -> Iterator[tuple[int, object]]:
    with open_bytes(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def count_rows(path: Path, kind: FileKind) -> int:
    """Rows of a file, without parsing where its kind allows; lines of blanks alone do not count."""
    if kind in ("jsonl", "txt"):
        return _count_lines(path)
    if kind == "parquet":
        return parquet_count(path)
    return sum(1 for _ in read_rows(path, kind))


def _count_lines(path: Path) -> int:
    with open_bytes(path) as file:
        return sum(1 for line in file if not line.isspace())

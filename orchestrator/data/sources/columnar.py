"""Reads rows of Parquet and Arrow files; the only module that uses pyarrow, imported when a file needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError

BATCH_ROWS = 1024


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of a Parquet file. Raises DataError if it is broken."""
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=BATCH_ROWS))
    except arrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def parquet_count(path: Path) -> int:
    """Rows of a Parquet file by its footer. Raises DataError if it is broken."""
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    try:
        return int(parquet.read_metadata(path).num_rows)
    except arrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def arrow_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of an Arrow file. Raises DataError if it is broken."""
    arrow: Any = import_module("pyarrow")
    try:
        with arrow.memory_map(str(path)) as source:
            yield from _numbered(_arrow_batches(arrow, source))
    except arrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Arrow file: {error}") from error


def _arrow_batches(arrow: Any, source: Any) -> Iterator[Any]:
    """Batches of an Arrow file (random access) or stream (what the `datasets` library writes)."""
    try:
        reader = arrow.ipc.open_file(source)
    except arrow.ArrowInvalid:
        source.seek(0)
        yield from arrow.ipc.open_stream(source)
        return
    for i in range(int(reader.num_record_batches)):
        yield reader.get_batch(i)


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[int, object]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row

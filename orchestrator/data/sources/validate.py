"""Validates the files of a source: their format, and every unusable row. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from orchestrator.config.data import DataFormat, SourceConfig
from orchestrator.data.formats.columns import KINDS, detect, mapping_override, mapping_problem, suggested
from orchestrator.data.formats.examples import Example, Reading, Row, RowProblem
from orchestrator.data.formats.parse import EXPECTED_FIELDS, parse_row
from orchestrator.data.row_faults import Fault, FaultList
from orchestrator.data.sources.locate import known_kind, locate
from orchestrator.data.sources.readers import Unreadable, count_rows, position, read_rows
from orchestrator.errors import DataError

DROPPED = {"equal_pair": "dropped_equal_pairs", "unlabelled_dropped": "dropped_unlabelled"}
"""Problems for which a row is skipped -> their names in the counts."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Facts from a quick inspection of a data set; `rows` is None for a hub id that is not on this machine."""

    files: tuple[Path, ...]
    format: DataFormat | None
    rows: int | None
    bytes: int
    first: Row | None
    """The first row that is an object; None if there is none."""


def inspect(source: SourceConfig, *, field: str, wanted: str | None = None) -> SourceFacts:
    """Inspect a source quickly for the plan: files, format, rows, bytes. `field` is the key that errors name, `wanted`
    the kind of rows that they suggest how to get. Raises DataError.
    """
    files = locate(source, field=field)
    if files is None:
        known = None if source.format == "auto" else source.format
        return SourceFacts(files=(), format=known, rows=None, bytes=0, first=None)
    rows = sum(count_rows(file, known_kind(file)) for file in files)
    if rows == 0:
        raise DataError(f"{field}.path={source.path} holds no rows: {_names(files)} is empty")
    data_format = settle_format(source, files, field=field, wanted=wanted)
    first = _first_object(files)
    if first is not None:
        _refuse_mapping(source, data_format, first, field=field, wanted=wanted)
    return SourceFacts(files, data_format, rows, sum(f.stat().st_size for f in files), first)


def _refuse_mapping(source: SourceConfig, data_format: DataFormat, row: Row, *, field: str, wanted: str | None) -> None:
    """Raise DataError if the mapping is invalid, or the columns of a typed format have other, well-known names."""
    problem = mapping_problem(data_format, source.columns, row)
    if problem is not None:
        raise DataError(f"{field}.columns: {problem}")
    mapping = suggested(list(map(str, row)), wanted or KINDS[data_format])
    if mapping is None or {"prompt", "instruction"} & {*row, *source.columns}:
        return
    if data_format == "prompts":
        raise DataError(
            f"{field}.path={source.path}: there is no column prompt; type {mapping_override(field, mapping)}"
        )
    chosen, prompt = row.get("chosen"), row.get(mapping.get("prompt", ""))
    is_left_out = isinstance(chosen, str) and isinstance(prompt, str) and not chosen.startswith(prompt)
    if data_format == "preference" and is_left_out:
        raise DataError(
            f"{field}.path={source.path}: the prompt of a pair is in column {mapping['prompt']}, which format preference does not "
            f"read; type {mapping_override(field, mapping)}"
        )


def _names(files: tuple[Path, ...]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def source_rows(files: tuple[Path, ...]) -> Iterator[tuple[Path, int, object]]:
    """(file, line or row number, row or Unreadable) of every row, in order."""
    for file in files:
        for number, row in read_rows(file, known_kind(file)):
            yield file, number, row


def settle_format(
    source: SourceConfig, files: tuple[Path, ...], *, field: str, wanted: str | None = None
) -> DataFormat:
    """The configured format, or the one detected from the first readable row. Raises DataError."""
    if source.format != "auto":
        return source.format
    row = _first_object(files)
    if row is None:
        raise DataError(f"{field}.path={source.path}: {_names(files)} holds no readable row")
    found = detect(row, source.columns)
    if found is not None:
        return found
    names = sorted(map(str, row))
    known = "; ".join(f"{name} ({fields})" for name, fields in EXPECTED_FIELDS.items())
    mapping = suggested(names, wanted or "text")
    # instruction and output use the chat template, which an instruct model needs; prompt and completion bypass it
    advice = (
        f"Map them with {field}.columns='{{instruction: COLUMN, output: COLUMN}}'"
        if mapping is None
        else f"Type {mapping_override(field, mapping)}"
    )
    raise DataError(
        f"{field}.path={source.path}: no format has the columns {', '.join(names)}. {advice}. Known formats: {known}"
    )


def _first_object(files: tuple[Path, ...]) -> Row | None:
    """The first of the first 20 rows that is an object."""
    rows = (row for _, _, row in islice(source_rows(files), 20))
    return next((cast("dict[str, Any]", row) for row in rows if isinstance(row, dict)), None)


def validate_rows(source: SourceConfig, *, field: str = "data.train") -> int:
    """Read every row and return their number; raise DataError with the first problems and their count."""
    files = locate(source, field=field)
    if files is None:
        raise DataError(f"{field}.path={source.path} is not on this machine: `prepare` fetches a hub data set")
    data_format = settle_format(source, files, field=field)
    faults = FaultList()
    rows = 0
    for file, number, row in source_rows(files):
        rows += 1
        parsed = parse_or_fault(row, position(file, number), reading_of(source, data_format))
        if isinstance(parsed, Fault):
            faults.add(parsed)
    if rows == 0:
        raise DataError(f"{field}.path={source.path} holds no rows: {_names(files)} is empty")
    faults.raise_if_any()
    return rows


def reading_of(source: SourceConfig, data_format: DataFormat) -> Reading:
    """How the rows of a source are read."""
    return Reading(format=data_format, columns=source.columns, unlabelled=source.unlabelled, no_label=source.no_label)


def parse_or_fault(row: object, where: str, reading: Reading) -> Example | Fault | str:
    """The example of a row, its problem, or the reason (as in the counts) why it is skipped: a pair of equal answers,
    which teaches nothing, or a row without a label if these are dropped.
    """
    if isinstance(row, Unreadable):
        return Fault("unreadable", where, f"{row.found}, {row.expected} expected")
    try:
        return parse_row(row, reading.format, reading.columns, labels=reading)
    except RowProblem as problem:
        if problem.code in DROPPED:
            return DROPPED[problem.code]
        return Fault(problem.code, where, str(problem))

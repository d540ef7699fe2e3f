"""Where the rows of a data set are, what is there, and whether every row can be used; must not import torch or datasets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from orchestrator.config.data import DataConfig, DataFormat, SourceConfig
from orchestrator.data.formats.columns import KINDS, detect, mapping_override, mapping_problem, suggested
from orchestrator.data.formats.examples import Example, Reading, Row, RowProblem
from orchestrator.data.formats.parse import EXPECTED_FIELDS, parse_row
from orchestrator.data.row_faults import Fault, FaultList
from orchestrator.data.sources.readers import SUFFIXES, FileKind, Unreadable, count_rows, file_kind, position, read_rows
from orchestrator.errors import DataError

DEMONSTRATION = Path(__file__).resolve().parents[2] / "demonstration"
DEMONSTRATIONS = {
    "demonstration": ("train.jsonl", "held_out.jsonl"),
    "demonstration_preferences": ("preference.jsonl", "preference_held_out.jsonl"),
    "demonstration_requests": ("requests.jsonl", "requests_held_out.jsonl"),
}
"""The sets that ship with this tool, by their keyword: rows to train on, and held-out ones."""
DROPPED = {"equal_pair": "dropped_equal_pairs", "unlabelled_dropped": "dropped_unlabelled"}
"""Problems of a row that leave it out -> their names in the counts."""
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What a quick look says of a data set; `rows` is None for a hub id that is not on this machine."""

    files: tuple[Path, ...]
    format: DataFormat | None
    rows: int | None
    bytes: int
    first: Row | None
    """The first row that is an object; None where there is none."""


def inspect(source: SourceConfig, *, field: str, wanted: str | None = None) -> SourceFacts:
    """A quick look for the plan: files, format, rows, bytes. `field` is the key that errors name, `wanted` the kind of rows that
    they help to get. Raises DataError."""
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
    """DataError where the mapping cannot be obeyed, or the columns of a typed format bear other, well-known names."""
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


def held_out_source(config: DataConfig) -> SourceConfig | None:
    """The files of the evaluation, or None where it is `none` or a split of train."""
    held_out = config.eval
    path = held_out.path
    if path == "auto" and config.train.path in DEMONSTRATIONS and not config.mix:
        path = str(DEMONSTRATION / DEMONSTRATIONS[config.train.path][1])
    if path in ("none", "auto"):
        return None
    return SourceConfig(
        path=path,
        format=held_out.format,
        split=held_out.split,
        subset=held_out.subset,
        revision=held_out.revision,
        columns=held_out.columns,
        unlabelled=held_out.unlabelled,
        no_label=held_out.no_label,
        rows=None,
        weight=None,
    )


def splits_train(config: DataConfig) -> bool:
    """Whether the evaluation rows are taken out of train."""
    return config.eval.path == "auto" and held_out_source(config) is None


def locate(source: SourceConfig, *, field: str) -> tuple[Path, ...] | None:
    """The files of a source in a fixed order, or None for a hub id that is not on this machine. Raises DataError."""
    if source.path in DEMONSTRATIONS:
        return (DEMONSTRATION / DEMONSTRATIONS[source.path][0],)
    path = Path(source.path).expanduser()
    if path.is_file():
        known_kind(path)
        return (path.absolute(),)
    if path.is_dir():
        return _folder_files(path.absolute(), source.split, field=field)
    if glob.has_magic(source.path):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = tuple(sorted(Path(name).absolute() for name in names if Path(name).is_file()))
        if not files:
            raise DataError(f"{field}.path={source.path} matches no file")
        for file in files:
            known_kind(file)
        return files
    if HUB_ID.match(source.path) and path.suffix not in SUFFIXES:
        cached = cached_hub_folder(source.path, source.revision)
        return None if cached is None else hub_files(cached, source, field=field)
    raise DataError(f"{field}.path={source.path} is not there: give a file, a glob, a folder or a hub id (owner/name)")


def cached_hub_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub data set in the local cache, or None."""
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / ("datasets--" + name.replace("/", "--"))
    wanted = revision or "main"
    reference = root / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    folder = root / "snapshots" / commit
    return folder if folder.is_dir() else None


def hub_files(folder: Path, source: SourceConfig, *, field: str) -> tuple[Path, ...]:
    """The files of the wanted subset and split in a downloaded hub data set. Raises DataError."""
    base = folder / source.subset if source.subset and (folder / source.subset).is_dir() else folder
    return _folder_files(base, source.split, field=field)


def _folder_files(folder: Path, split: str | None, *, field: str) -> tuple[Path, ...]:
    """Data files below a folder; of one split where it is named, or of `train` where the names speak of splits."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES and not _is_about(p))
    if not found:
        raise DataError(f"{field}.path={folder} holds no data file ({', '.join(SUFFIXES)}, also .gz)")
    splits = {name: [p for p in found if _belongs(p.relative_to(folder), name)] for name in _split_names(found, folder)}
    wanted = split if split is not None else "train" if "train" in splits else None
    if wanted is None:
        return tuple(found)
    if wanted not in splits:
        raise DataError(f"{field}.split={wanted} is not in {folder}: found {', '.join(splits) or 'no splits by name'}")
    return tuple(splits[wanted])


_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|dev|eval|held_out)(?=[/_.-]|$)")


def _split_names(files: list[Path], folder: Path) -> list[str]:
    names = {match.group(1) for p in files if (match := _SPLIT.search(p.relative_to(folder).as_posix()))}
    return sorted(names)


def _belongs(relative: Path, split: str) -> bool:
    match = _SPLIT.search(relative.as_posix())
    return match is not None and match.group(1) == split


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _is_about(path: Path) -> bool:
    """Whether a file only describes a data set (what the `datasets` library writes beside its rows)."""
    return (
        path.name in ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
        or path.name[0] == "."
    )


def known_kind(path: Path) -> FileKind:
    """The kind of a data file. Raises DataError for an unknown one."""
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path} is of no known kind: {', '.join(SUFFIXES)} are known, also with .gz")
    return kind


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
    """The format said by the configuration, or the one detected from the first readable row. Raises DataError."""
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
    # instruction and output go through the chat template, which an instruct model needs; prompt and completion go past it
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
    """Reads every row and returns their number; raises DataError with the first problems and their count."""
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
    """How the rows of a source are understood."""
    return Reading(format=data_format, columns=source.columns, unlabelled=source.unlabelled, no_label=source.no_label)


def parse_or_fault(row: object, where: str, reading: Reading) -> Example | Fault | str:
    """The example of a row, what is wrong with it, or the reason (as in the counts) why it is left out: a pair of equal
    answers, of which nothing can be learnt, or a row without a label where these are dropped."""
    if isinstance(row, Unreadable):
        return Fault("unreadable", where, f"{row.found}, {row.expected} expected")
    try:
        return parse_row(row, reading.format, reading.columns, labels=reading)
    except RowProblem as problem:
        if problem.code in DROPPED:
            return DROPPED[problem.code]
        return Fault(problem.code, where, str(problem))

"""Facts and lengths of prepared rows for the plan, read without numpy, which takes a fifth of a second; must not import torch."""

from __future__ import annotations

import ast
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from orchestrator.config.training import TrainingStage
from orchestrator.data.epoch import epoch_of
from orchestrator.data.prepared.meta import read_meta
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from orchestrator.data.order import Indices

SAMPLE = 4096
"""Size of the sample of lengths, which gives the plan's means to about 1 %."""


def prepared_facts(folder: Path, evaluation: Path | None, *, stage: TrainingStage, seed: int) -> PreparedFacts:
    """Facts of a stage's prepared rows for its plan. Raises DataError if the folder is damaged."""
    statistics = read_meta(folder).statistics
    epoch = epoch_of(stage, statistics.rows, lambda: _lengths(folder), seed=seed)
    return PreparedFacts(
        rows=statistics.rows,
        units=statistics.units,
        tokens=statistics.tokens,
        trained_tokens=statistics.trained_tokens,
        evaluation_rows=0 if evaluation is None else read_meta(evaluation).statistics.rows,
        steps_per_epoch=epoch.steps,
        row_lengths=_sample(folder / "row_lengths.npy"),
        document_lengths=_sample(folder / "document_offsets.npy", differences=True),
    )


def _lengths(folder: Path) -> Indices:
    from orchestrator.data.prepared.folder import PreparedFolder  # numpy, which takes a fifth of a second

    return PreparedFolder(folder).lengths


def _sample(path: Path, *, differences: bool = False) -> tuple[int, ...]:
    """Evenly spaced numbers of a one-dimensional int64 .npy file, or their differences from the preceding number."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            numbers = memoryview(content)[_data_start(content, path) :].cast("q")
            last = len(numbers) - differences
            indices = range(0, last, max(1, last // SAMPLE))
            sample = tuple(numbers[i + 1] - numbers[i] if differences else numbers[i] for i in indices)
            numbers.release()
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} is not an array of lengths: {error}") from error
    return sample


def _data_start(content: mmap.mmap, path: Path) -> int:
    """Offset of the first number: magic, version, length of the header in two bytes (version 1) or four, header."""
    if content[:6] != b"\x93NUMPY":
        raise DataError(f"{path} is not an .npy file")
    size = 2 if content[6] == 1 else 4
    start = 8 + size
    end = start + int.from_bytes(content[8:start], "little")
    header = cast("dict[str, object]", ast.literal_eval(content[start:end].decode("latin-1")))
    if header["descr"] != "<i8":
        raise DataError(f"{path} holds {header['descr']}, <i8 is expected")
    return end


@dataclass(frozen=True, kw_only=True)
class PreparedFacts:
    """Statistics of prepared train rows from the cache; the lengths are an even sample of at most a few thousand."""

    rows: int
    """Trainable rows: packed ones with packing."""
    units: int
    """Source rows that are used."""
    tokens: int
    trained_tokens: int
    evaluation_rows: int
    steps_per_epoch: int
    row_lengths: tuple[int, ...]
    document_lengths: tuple[int, ...]

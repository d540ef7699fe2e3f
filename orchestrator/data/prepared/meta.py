"""Facts of a folder of prepared rows, from its small metadata file.

Must not import torch or numpy, because the plan reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from orchestrator.errors import DataError

DATA_VERSION = 4
"""Part of every digest. Raise it with any change of the code that changes a single prepared token; a golden test watches."""
META = "meta.json"
EVALUATION = "evaluation"
"""The folder, inside the one of train, of rows that were split off from train."""

Kind = Literal["text", "pair", "feedback", "class", "prompt"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts made by the preparation."""

    source_rows: int
    """Rows of the files, before anything was dropped or drawn."""
    units: int
    """Used rows; one that a mixture repeats counts every time."""
    duplicates: int
    """Kept rows that repeat an earlier one verbatim (unused if `deduplicate` is on)."""
    documents: int
    """Used texts: one per row, two for a preference."""
    rows: int
    """Trainable rows: packed ones with packing."""
    tokens: int
    trained_tokens: int
    """Targets after the causal shift."""
    truncated_rows: int
    """Used rows that lost tokens to `max_length`."""
    truncated_tokens: int
    rows_losing_trained_tokens: int
    """Rows that lost trained tokens, including those dropped for it."""
    dropped: Mapping[str, int]
    """Unused rows, by reason."""
    longest_tokens: int
    """Tokens of the longest trainable row."""
    packing_efficiency: float
    """Real tokens / (rows x capacity) if rows are packed; else real tokens / (rows x longest)."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The small facts of a prepared folder."""

    digest: str
    key: Mapping[str, Any]
    kind: Kind
    format: str
    documents_per_unit: int
    max_length: int
    packing: str
    pad_id: int
    vocab_size: int
    classes: tuple[str, ...]
    """Names of the classes, by their number; empty where there are none."""
    file_rows: tuple[int, ...]
    """Rows of every file, in order; row ids run consecutively over the files."""
    statistics: Statistics

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Meta:
        fields = cast("dict[str, Any]", json.loads(text))
        fields["classes"], fields["file_rows"] = tuple(fields["classes"]), tuple(fields["file_rows"])
        fields["statistics"] = Statistics(**fields["statistics"])
        return Meta(**fields)


def read_meta(folder: Path) -> Meta:
    """The facts of a prepared folder. Raises DataError if it is not one."""
    try:
        return Meta.from_json((folder / META).read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} holds no prepared data: {error}") from error


def is_prepared(folder: Path) -> bool:
    """Whether the folder was completed: it is renamed into place after its last file is on disk."""
    return (folder / META).is_file()

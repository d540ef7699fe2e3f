"""A folder of prepared rows: memory-mapped arrays and what is known of them; numpy only, so the plan may open it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from orchestrator.errors import DataError

DATA_VERSION = 3
"""Part of every digest. Raise it with any change of the code that changes a single prepared token; a golden test watches."""
META = "meta.json"
EVALUATION = "evaluation"
"""The folder, inside the one of train, of rows that were split off from train."""

Kind = Literal["text", "pair", "feedback", "class", "prompt"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What preparing counted."""

    source_rows: int
    """Rows of the files, before anything was dropped or drawn."""
    units: int
    """Rows that are used; one that a mixture repeats counts every time."""
    duplicates: int
    """Kept rows that stand earlier word by word (not used where `deduplicate` is on)."""
    documents: int
    """Texts that are used: one for a row, two for a preference."""
    rows: int
    """Trainable rows: packed ones where packing is on."""
    tokens: int
    trained_tokens: int
    """Targets after the causal shift."""
    truncated_rows: int
    """Used rows that lost tokens to `max_length`."""
    truncated_tokens: int
    rows_losing_trained_tokens: int
    """Rows that lost learnt tokens, those dropped for it included."""
    dropped: Mapping[str, int]
    """Rows that are not used, by reason."""
    longest_tokens: int
    """Tokens of the longest trainable row."""
    packing_efficiency: float
    """Real tokens / (rows x capacity) where rows are packed; else real tokens / (rows x longest)."""


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
    """Rows of every file, in order: row ids count on over the files."""
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
    """The facts of a prepared folder. Raises DataError where it is not one."""
    try:
        return Meta.from_json((folder / META).read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} holds no prepared data: {error}") from error


def is_prepared(folder: Path) -> bool:
    """Whether the folder was completed: it is renamed into place after its last file is on disk."""
    return (folder / META).is_file()


class PreparedFolder:
    """Memory maps of a prepared folder.

    A unit is a source row with its one document or two (chosen, rejected). A trainable row is a list of segments, and a
    segment is a document or a piece of one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        self.digest = self.meta.digest

    def _map(self, name: str) -> npt.NDArray[Any]:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """Every document's token ids, end to end."""
        return self._map("tokens")

    @cached_property
    def trained(self) -> npt.NDArray[np.bool_]:
        """For every token, whether it is a target; the first one of a document never is."""
        return self._map("trained")

    @cached_property
    def document_offsets(self) -> npt.NDArray[np.int64]:
        return self._map("document_offsets")

    @cached_property
    def unit_rows(self) -> npt.NDArray[np.int64]:
        """The source row of every unit, counted from 0 over all files of all sources."""
        return self._map("unit_rows")

    @cached_property
    def unit_numbers(self) -> npt.NDArray[np.int64]:
        """The line (JSONL) or row number of every unit in its file, from 1."""
        return self._map("unit_numbers")

    @cached_property
    def unit_hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of every unit's words, for finding rows that stand in two sets."""
        return self._map("unit_hashes")

    @cached_property
    def unit_values(self) -> npt.NDArray[np.float32]:
        """Margin, label or class number of every unit; NaN where there is none."""
        return self._map("unit_values")

    @cached_property
    def unit_cut_trained(self) -> npt.NDArray[np.int32]:
        """Learnt tokens that every unit lost to `max_length`."""
        return self._map("unit_cut_trained")

    @cached_property
    def segment_documents(self) -> npt.NDArray[np.int64]:
        return self._map("segment_documents")

    @cached_property
    def segment_starts(self) -> npt.NDArray[np.int64]:
        return self._map("segment_starts")

    @cached_property
    def segment_stops(self) -> npt.NDArray[np.int64]:
        return self._map("segment_stops")

    @cached_property
    def row_offsets(self) -> npt.NDArray[np.int64]:
        return self._map("row_offsets")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every trainable row."""
        return self._map("row_lengths")

    @cached_property
    def trained_tokens(self) -> npt.NDArray[np.int64]:
        """Targets of every trainable row: label positions after the causal shift."""
        return self._map("row_trained")

    @property
    def rows(self) -> int:
        """Trainable rows."""
        return self.meta.statistics.rows

    def unit_of(self, document: int) -> int:
        return document // self.meta.documents_per_unit

    def row_ids(self, index: int) -> tuple[int, ...]:
        """The source rows inside a trainable row, in order; nothing for a filler (-1)."""
        if index < 0:
            return ()
        segments = slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))
        units = self.segment_documents[segments] // self.meta.documents_per_unit
        return tuple(dict.fromkeys(self.unit_rows[units].tolist()))

    def document_ids(self, document: int) -> npt.NDArray[np.int64]:
        """The token ids of a document."""
        span = slice(int(self.document_offsets[document]), int(self.document_offsets[document + 1]))
        return self.tokens[span].astype(np.int64)

    def extra(self, unit: int) -> str | None:
        """JSON of what came along with a unit's row (reference answers), or None."""
        path = self.folder / "extras.jsonl"
        if not path.is_file():
            return None
        with path.open("rb") as file:
            file.seek(int(self._extra_offsets[unit]))
            return file.read(int(self._extra_offsets[unit + 1] - self._extra_offsets[unit])).decode()

    @cached_property
    def _extra_offsets(self) -> npt.NDArray[np.int64]:
        return self._map("extra_offsets")

    def where(self, row: int, number: int, files: tuple[Path, ...]) -> str:
        """`file:line` of a source row."""
        ends = np.cumsum(self.meta.file_rows)
        return f"{files[int(np.searchsorted(ends, row, side='right'))]}:{number}"

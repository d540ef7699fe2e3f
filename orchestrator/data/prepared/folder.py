"""A folder of prepared rows: memory-mapped arrays and their facts; numpy only."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data.prepared.meta import read_meta
from orchestrator.data.sources.readers import position


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
        """Every document's token ids, concatenated."""
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
        """A hash of every unit's words, for finding rows that occur in two sets."""
        return self._map("unit_hashes")

    @cached_property
    def unit_values(self) -> npt.NDArray[np.float32]:
        """Margin, label or class number of every unit; NaN if there is none."""
        return self._map("unit_values")

    @cached_property
    def unit_cut_trained(self) -> npt.NDArray[np.int32]:
        """Trained tokens that every unit lost to `max_length`."""
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
        """JSON of the extra fields of a unit's row (reference answers), or None."""
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
        return position(files[int(np.searchsorted(ends, row, side="right"))], number)

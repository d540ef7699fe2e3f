"""A folder of prepared rows: memory-mapped arrays and what is known of them; numpy only, so the plan may open it too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from orchestrator.errors import DataError

DATA_VERSION = 1
"""Part of every digest. Raise it with any change of the code that changes a single prepared token; a golden test watches."""
META = "meta.json"

Kind = Literal["single", "pair", "prompt"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What preparing counted. A truncated row is one that lost tokens to `max_length`."""

    source_rows: int
    """Rows of the files, after mixing and before dropping."""
    duplicates: int
    """Rows that stand earlier word by word (dropped where `deduplicate` is on)."""
    documents: int
    rows: int
    """Trainable rows: packed ones where packing is on."""
    tokens: int
    trained_tokens: int
    truncated_rows: int
    truncated_tokens: int
    rows_losing_trained_tokens: int
    dropped_rows: int
    """Rows whose whole answer lies behind `max_length`: nothing of them could be learnt."""
    longest_tokens: int
    packing_efficiency: float
    """Real tokens / (rows x max_length) where rows are packed; else real tokens / (rows x longest)."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The small facts of a prepared folder."""

    digest: str
    key: dict[str, Any]
    kind: Kind
    max_length: int
    packing: str
    pad_id: int
    vocab_size: int
    statistics: Statistics

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Meta:
        fields = cast("dict[str, Any]", json.loads(text))
        return Meta(**{**fields, "statistics": Statistics(**fields["statistics"])})


class PreparedFolder:
    """Memory maps of a prepared folder. A row is a list of segments; a segment is a piece of a document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta = Meta.from_json((folder / META).read_text())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder} holds no prepared data: {error}") from error
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
    def document_rows(self) -> npt.NDArray[np.int64]:
        """The source row of every document, counted from 0 over the source's files (a mixture counts on over its sources)."""
        return self._map("document_rows")

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

    @cached_property
    def values(self) -> npt.NDArray[np.float32]:
        """Margin, label or class of every document's row; NaN where there is none."""
        return self._map("document_values")

    @cached_property
    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of the words of every kept source row, for finding rows that stand in two sets."""
        return self._map("row_hashes")

    @property
    def rows(self) -> int:
        """Trainable rows."""
        return self.meta.statistics.rows

    def row_ids(self, index: int) -> tuple[int, ...]:
        """The source rows inside a trainable row, in order; nothing for a filler (-1)."""
        if index < 0:
            return ()
        segments = slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))
        return tuple(dict.fromkeys(self.document_rows[self.segment_documents[segments]].tolist()))

    def extra(self, document: int) -> str | None:
        """JSON of what came along with a document's row (reference answers), or None."""
        path = self.folder / "extras.jsonl"
        if not path.is_file():
            return None
        offsets = self._extra_offsets
        with path.open("rb") as file:
            file.seek(int(offsets[document]))
            return file.read(int(offsets[document + 1] - offsets[document])).decode()

    @cached_property
    def _extra_offsets(self) -> npt.NDArray[np.int64]:
        return self._map("extra_offsets")


def is_prepared(folder: Path) -> bool:
    """Whether the folder was completed: it is renamed into place after its last file is on disk."""
    return (folder / META).is_file()

"""Writing prepared rows: arrays that grow while rows come in, then packing, then an atomic rename; no torch needed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from orchestrator.dataset.packing import Segments, best_fit, single_rows, split_rows, whole_rows


class GrowingArray:
    """A one-dimensional .npy file that is written in pieces; its header is completed at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.length = 0
        self._write_header()

    def _write_header(self) -> None:
        """The header of a fixed size: numpy pads it so that the length can grow in place."""
        self._file.seek(0)
        npy.write_array_header_1_0(
            self._file, {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.length,)}
        )

    def append(self, values: npt.ArrayLike) -> None:
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.length += len(array)

    def close(self) -> None:
        """Completes the header and brings the file to disk."""
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close() if error is not None else self.close()


def save_array(folder: Path, name: str, array: npt.NDArray[Any]) -> None:
    """One whole array as a .npy file on disk."""
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def write_rows(folder: Path, segments: Segments, document_offsets: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_]) -> None:
    """The rows' segments, lengths and targets. A segment's first token is no target."""
    counts = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    begins = document_offsets[segments.documents]
    targets = counts[begins + segments.stops] - counts[np.minimum(begins + segments.starts + 1, begins + segments.stops)]
    save_array(folder, "segment_documents", segments.documents)
    save_array(folder, "segment_starts", segments.starts)
    save_array(folder, "segment_stops", segments.stops)
    save_array(folder, "row_offsets", segments.offsets)
    save_array(folder, "row_lengths", _per_row(segments.stops - segments.starts, segments.offsets))
    save_array(folder, "row_trained", _per_row(targets, segments.offsets))


def _per_row(values: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def make_rows(lengths: npt.NDArray[np.int64], *, packing: str, max_length: int, documents_per_row: int) -> Segments:
    """The rows that the packing rule makes of documents of these lengths."""
    if packing == "split":
        return split_rows(lengths, max_length)
    units = lengths.reshape(-1, documents_per_row).sum(axis=1)
    capacity = max_length * documents_per_row
    packs = best_fit(units, capacity) if packing == "best_fit" else single_rows(len(units))
    return whole_rows(packs, documents_per_row, lengths)


def sync_folder(folder: Path) -> None:
    """Brings the folder's list of names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, pieces: Iterable[bytes]) -> None:
    """A small file, on disk when this returns."""
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())

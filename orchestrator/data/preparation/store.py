"""Writes prepared rows: arrays that grow as rows come in, then rows, packs and facts; no torch needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from orchestrator.config.data import DataConfig
from orchestrator.data.encoding.encoder import Encoder
from orchestrator.data.preparation.packing import Segments, efficiency, pack, single_rows, split_rows, whole_rows
from orchestrator.data.prepared.meta import META, Kind, Meta, Statistics
from orchestrator.errors import DataError

Ints = npt.NDArray[np.int64]


class GrowingArray:
    """A one-dimensional .npy file written in pieces; its header is completed at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.length = 0
        self._write_header()

    def _write_header(self) -> None:
        """numpy reserves space in the header, so that the length can grow in place."""
        self._file.seek(0)
        shape = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self._file, shape)

    def append(self, values: npt.NDArray[Any]) -> None:
        # Straight to disk: a million rows need not fit into memory.
        self._file.write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Complete the header and sync the file to disk."""
        self._write_header()
        _sync(self._file)
        self._file.close()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def save_array(folder: Path, name: str, array: npt.NDArray[Any]) -> None:
    """One whole array as a .npy file on disk."""
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync(file)


def write_synced(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that is on disk when this returns."""
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        _sync(file)


def sync_folder(folder: Path) -> None:
    """Sync the folder's directory entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, kw_only=True)
class Units:
    """The kept rows of a data set; tokens and masks are in `folder`. Unit u has the documents u*k .. u*k + k - 1."""

    folder: Path
    rows: Ints
    sources: Ints
    numbers: Ints
    hashes: npt.NDArray[np.uint64]
    values: npt.NDArray[np.float32]
    cut: npt.NDArray[np.int32]
    cut_trained: npt.NDArray[np.int32]
    extras: tuple[str, ...]
    documents_per_unit: int
    offsets: Ints
    """Where every document starts in the tokens, and where the last one ends."""

    def subset(self, chosen: Ints, folder: Path) -> Units:
        """These units alone, with their tokens copied into another folder."""
        documents = (chosen[:, None] * self.documents_per_unit + np.arange(self.documents_per_unit)).reshape(-1)
        lengths = np.diff(self.offsets)[documents]
        for name in ("tokens", "trained"):
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            save_array(
                folder, name, np.concatenate([array[self.offsets[d] : self.offsets[d + 1]] for d in documents.tolist()])
            )
        picked = {
            name: getattr(self, name)[chosen]
            for name in ("rows", "sources", "numbers", "hashes", "values", "cut", "cut_trained")
        }
        return Units(
            folder=folder,
            extras=tuple(self.extras[unit] for unit in chosen.tolist()) if self.extras else (),
            documents_per_unit=self.documents_per_unit,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            **picked,
        )


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where prepared rows are written, and what they were made with."""

    folder: Path
    digest: str
    key: Mapping[str, Any]
    kind: Kind
    format: str
    encoder: Encoder
    config: DataConfig
    file_rows: tuple[int, ...]

    def inside(self, name: str) -> Store:
        """A folder inside this one, with its own digest."""
        return replace(self, folder=self.folder / name, digest=f"{self.digest}-{name}")


def write_store(
    store: Store, units: Units, chosen: Ints | None, *, source_rows: int, dropped: Mapping[str, int]
) -> None:
    """Write all but tokens.npy and trained.npy, which exist; meta.json last. `chosen` None takes every unit once."""
    picked = np.arange(len(units.rows)) if chosen is None else chosen
    classes = _classes(units) if store.kind == "class" else ()
    segments = _segments(store.config, units, picked)
    trained = np.load(store.folder / "trained.npy", mmap_mode="r")
    row_lengths, row_trained = row_counts(segments, units.offsets, trained)
    arrays = {
        "document_offsets": units.offsets,
        "unit_rows": units.rows,
        "unit_numbers": units.numbers,
        "unit_hashes": units.hashes,
        "unit_values": units.values,
        "unit_cut_trained": units.cut_trained,
        "segment_documents": segments.documents,
        "segment_starts": segments.starts,
        "segment_stops": segments.stops,
        "row_offsets": segments.offsets,
        "row_lengths": row_lengths,
        "row_trained": row_trained,
    }
    for name, array in arrays.items():
        save_array(store.folder, name, array)
    _write_extras(store.folder, units.extras)
    statistics = _statistics(store, units, picked, row_lengths, row_trained, source_rows=source_rows, dropped=dropped)
    facts = store.encoder.facts
    meta = Meta(
        digest=store.digest,
        key=store.key,
        kind=store.kind,
        format=store.format,
        documents_per_unit=units.documents_per_unit,
        max_length=store.config.max_length,
        packing=store.config.packing,
        pad_id=facts.pad_id,
        vocab_size=facts.vocab_size,
        classes=classes,
        file_rows=store.file_rows,
        statistics=statistics,
    )
    # Last: a folder without it is not finished.
    write_synced(store.folder / META, [meta.to_json().encode()])
    sync_folder(store.folder)


def _segments(config: DataConfig, units: Units, picked: Ints) -> Segments:
    """The rows into which the packing rule arranges the selected units."""
    per_unit = units.documents_per_unit
    lengths = np.diff(units.offsets)
    documents = (picked[:, None] * per_unit + np.arange(per_unit)).reshape(-1)
    if config.packing == "split":
        if per_unit > 1:
            raise DataError("packing=split would split a preference pair: set packing=best_fit or packing=none")
        cut = split_rows(lengths[documents], config.max_length)
        return replace(cut, documents=documents[cut.documents])
    if config.packing == "best_fit":
        packs = pack(lengths[documents].reshape(-1, per_unit).sum(axis=1), capacity(config, per_unit))
    else:
        packs = single_rows(len(picked))
    rows = whole_rows(packs, per_unit, lengths[documents])
    return replace(rows, documents=documents[rows.documents])


def capacity(config: DataConfig, documents_per_unit: int) -> int:
    """Tokens of a packed row: a pair's two documents have room for two."""
    return config.max_length * documents_per_unit


def row_counts(segments: Segments, offsets: Ints, trained: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Tokens and targets of every row. A segment's first token is no target: nothing precedes it to predict it."""
    # 64 bits: the counts of large sets exceed 32.
    counts = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    begins = offsets[segments.documents]
    firsts = np.minimum(begins + segments.starts + 1, begins + segments.stops)
    targets = counts[begins + segments.stops] - counts[firsts]
    return _per_row(segments.stops - segments.starts, segments.offsets), _per_row(targets, segments.offsets)


def _per_row(values: Ints, offsets: Ints) -> Ints:
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def _classes(units: Units) -> tuple[str, ...]:
    """The class names that occur in the rows, in order; empty for numeric labels."""
    labels = [json.loads(extra)["label"] for extra in units.extras]
    single = [one for label in labels for one in (label if isinstance(label, list) else [label]) if one is not None]
    if any(isinstance(label, float) and not label.is_integer() for label in single):
        return ()
    is_text = any(isinstance(label, str) for label in single)
    return tuple(
        sorted({str(label) for label in single}) if is_text else map(str, sorted({int(one) for one in single}))
    )


def _write_extras(folder: Path, extras: tuple[str, ...]) -> None:
    if not extras:
        return
    lines = [extra.encode() for extra in extras]
    write_synced(folder / "extras.jsonl", (line + b"\n" for line in lines))
    save_array(
        folder, "extra_offsets", np.concatenate([[0], np.cumsum([len(line) + 1 for line in lines])]).astype(np.int64)
    )


def _statistics(
    store: Store,
    units: Units,
    picked: Ints,
    row_lengths: Ints,
    row_trained: Ints,
    *,
    source_rows: int,
    dropped: Mapping[str, int],
) -> Statistics:
    per_unit = units.documents_per_unit
    tokens = int(row_lengths.sum())
    longest = int(row_lengths.max())
    room = longest if store.config.packing == "none" else capacity(store.config, per_unit)
    hidden = dropped.get("dropped_behind_max_length", 0)
    return Statistics(
        source_rows=source_rows,
        units=len(picked),
        duplicates=len(units.hashes) - len(np.unique(units.hashes)),
        documents=len(picked) * per_unit,
        rows=len(row_lengths),
        tokens=tokens,
        trained_tokens=int(row_trained.sum()),
        truncated_rows=int((units.cut[picked] > 0).sum()),
        truncated_tokens=int(units.cut[picked].sum()),
        rows_losing_trained_tokens=int((units.cut_trained[picked] > 0).sum()) + hidden,
        dropped={name: count for name, count in dropped.items() if count},
        longest_tokens=longest,
        packing_efficiency=efficiency(row_lengths, len(row_lengths), room),
    )

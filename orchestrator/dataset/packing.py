"""Joining documents to rows of a fixed length: best-fit decreasing, and plain cutting; must not import torch.

Best-fit decreasing (2404.10830): the longest document first, each into the fullest row that still has room. With lengths
as integers up to the capacity this is a bucket per remaining room, so a million documents take under a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packs:
    """Row r holds the units `members[offsets[r]:offsets[r + 1]]`."""

    members: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Segments:
    """Row r holds documents[i][starts[i]:stops[i]] for i in offsets[r]..offsets[r + 1]."""

    documents: Ints
    starts: Ints
    stops: Ints
    offsets: Ints


def best_fit(lengths: Ints, capacity: int) -> Packs:
    """Packs units of the given lengths (1..capacity) into rows of `capacity`; the same input gives the same rows."""
    assert len(lengths) == 0 or (1 <= int(lengths.min()) and int(lengths.max()) <= capacity)
    order = np.argsort(-lengths, kind="stable")
    sizes: list[int] = lengths[order].tolist()
    row_of: list[int] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = _Rooms(capacity)
    num_rows = 0
    for size in sizes:
        room = rooms.smallest_at_least(size)
        if room < 0:
            row, room = num_rows, capacity
            num_rows += 1
        else:
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms.remove(room)
        row_of.append(row)
        left = room - size
        if left:
            if not open_rows[left]:
                rooms.add(left)
            open_rows[left].append(row)
    return _by_row(order, np.array(row_of, dtype=np.int64), num_rows)


class _Rooms:
    """The set of remaining rooms that some row has, as bits of one integer: finding the tightest fit is one shift."""

    def __init__(self, capacity: int) -> None:
        self._bits = 0

    def add(self, room: int) -> None:
        self._bits |= 1 << room

    def remove(self, room: int) -> None:
        self._bits &= ~(1 << room)

    def smallest_at_least(self, size: int) -> int:
        above = self._bits >> size
        return -1 if not above else size + (above & -above).bit_length() - 1


def _by_row(order: Ints, row_of: Ints, num_rows: int) -> Packs:
    grouped = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=num_rows) if len(row_of) else np.zeros(0, dtype=np.int64)
    return Packs(order[grouped].astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def split_rows(lengths: Ints, capacity: int) -> Segments:
    """Lays the documents end to end in their order and cuts every `capacity` tokens; only the last row is short."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(lengths) else 0
    cuts = np.unique(np.concatenate([np.arange(0, total, capacity), ends - lengths, [total]]))
    starts, stops = cuts[:-1], cuts[1:]
    documents = np.searchsorted(ends, starts, side="right").astype(np.int64)
    begins = ends[documents] - lengths[documents]
    rows = np.arange(0, total, capacity)
    offsets = np.concatenate([np.searchsorted(starts, rows), [len(starts)]]).astype(np.int64)
    return Segments(documents, (starts - begins).astype(np.int64), (stops - begins).astype(np.int64), offsets)


def whole_rows(packs: Packs, documents_per_unit: int, lengths: Ints) -> Segments:
    """The segments of packs whose units are `documents_per_unit` whole documents that stand together."""
    documents = (packs.members[:, None] * documents_per_unit + np.arange(documents_per_unit)).reshape(-1)
    return Segments(documents, np.zeros_like(documents), lengths[documents], packs.offsets * documents_per_unit)


def single_rows(num_units: int) -> Packs:
    """One unit a row, in order."""
    return Packs(np.arange(num_units, dtype=np.int64), np.arange(num_units + 1, dtype=np.int64))


def efficiency(lengths: Ints, num_rows: int, capacity: int) -> float:
    """Share of the packed rows' tokens that are real."""
    return float(lengths.sum()) / (num_rows * capacity) if num_rows else 1.0

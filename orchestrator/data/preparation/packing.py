"""Packs documents into rows of fixed length: exact filling, best-fit decreasing, plain cutting; must not import torch.

Best-fit decreasing (2404.10830): the longest document first, each into the fullest row that still has room for it. If
documents are similar or few it leaves up to 3 % of the rows empty. Exact filling, a form of histogram packing
(2107.02027), fills row by row with the longest document left and the lengths that leave the least room next to it. The
better result of the two is used; both are deterministic and the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

FILL_CAPACITY = 4096
"""Exact filling comes first up to this many tokens per row, where it is also faster; above, best fit does."""
LONGEST_FILL = 8192
"""Exact filling is not tried above this: such rows hold so many documents that best fit leaves nothing empty."""
SLACK = 0.002
"""A method within this share of the minimum number of rows is accepted without trying the other."""


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


def pack(lengths: Ints, capacity: int) -> Packs:
    """Whole units of the given lengths (1..capacity) in the fewest rows of `capacity` that the two methods find."""
    if capacity > LONGEST_FILL:
        return best_fit(lengths, capacity)
    first, second = (exact_fill, best_fit) if capacity <= FILL_CAPACITY else (best_fit, exact_fill)
    packs = first(lengths, capacity)
    if len(packs) <= -(-int(lengths.sum()) // capacity) * (1 + SLACK):
        return packs
    other = second(lengths, capacity)
    return other if len(other) < len(packs) else packs


def best_fit(lengths: Ints, capacity: int) -> Packs:
    """Best-fit decreasing. O(n log n) for the sort; each unit then costs one search for the tightest room."""
    assert len(lengths) == 0 or (int(lengths.min()) >= 1 and int(lengths.max()) <= capacity)
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
    """The set of remaining rooms of all rows, as bits in words of 512: two shifts find the tightest fit."""

    WORD = 9

    def __init__(self, capacity: int) -> None:
        self._words = [0] * ((capacity >> self.WORD) + 1)
        self._used = 0

    def add(self, room: int) -> None:
        word = room >> self.WORD
        self._words[word] |= 1 << (room & 511)
        self._used |= 1 << word

    def remove(self, room: int) -> None:
        word = room >> self.WORD
        self._words[word] &= ~(1 << (room & 511))
        if not self._words[word]:
            self._used &= ~(1 << word)

    def smallest_at_least(self, size: int) -> int:
        """The smallest room of at least `size`, or -1."""
        word = size >> self.WORD
        above = self._words[word] >> (size & 511)
        if above:
            return size + (above & -above).bit_length() - 1
        later = self._used >> (word + 1)
        if not later:
            return -1
        word += (later & -later).bit_length()
        bits = self._words[word]
        return (word << self.WORD) + (bits & -bits).bit_length() - 1


def exact_fill(lengths: Ints, capacity: int) -> Packs:
    """Fill rows one by one: the longest unit left, then the combination of lengths that leaves the least room.

    A combination is reused for as many rows as the counts of its lengths allow, so the work grows with the number of
    different lengths and not with the number of units.
    """
    counts = np.bincount(lengths, minlength=capacity + 1).tolist()
    patterns: list[tuple[list[int], int]] = []
    present = [size for size in range(capacity, 0, -1) if counts[size]]
    while present:
        chosen = [present[0], *_fullest(present, counts, capacity - present[0])]
        times = min(counts[size] // chosen.count(size) for size in set(chosen))
        for size in chosen:
            counts[size] -= times
        patterns.append((chosen, times))
        present = [size for size in present if counts[size]]
    return _from_patterns(lengths, patterns)


def _fullest(present: list[int], counts: list[int], room: int) -> list[int]:
    """Lengths (the first of `present` already counted once) with the greatest sum that is at most `room`.

    Reachable sums as bits: `reached[i]` after the i-th distinct length. Long lengths come first and are preferred,
    which keeps the short ones for the last rows.
    """
    kinds = [size for size in present if size <= room]
    window = (1 << (room + 1)) - 1
    sums = 1
    reached = [sums]
    for size in kinds:
        left = counts[size] - (size == present[0])
        times = min(left, room // size)
        step = 1
        while times > 0:  # counts as powers of two: every multiple up to `times` is reached
            take = min(step, times)
            sums |= (sums << (take * size)) & window
            times -= take
            step *= 2
        reached.append(sums)
        if sums >> room:
            break
    chosen: list[int] = []
    target = sums.bit_length() - 1
    for i in range(len(reached) - 1, 0, -1):
        while not reached[i - 1] >> target & 1:
            chosen.append(kinds[i - 1])
            target -= kinds[i - 1]
    return chosen


def _from_patterns(lengths: Ints, patterns: list[tuple[list[int], int]]) -> Packs:
    """Assign units to every pattern: among equal lengths, those first in the input."""
    by_length = np.argsort(lengths, kind="stable")
    firsts = np.searchsorted(lengths[by_length], np.arange(int(lengths.max()) + 1)).tolist()
    members: list[Ints] = []
    sizes: list[Ints] = []
    for chosen, times in patterns:
        columns: list[Ints] = []
        for size in chosen:
            columns.append(by_length[firsts[size] : firsts[size] + times])
            firsts[size] += times
        members.append(np.stack(columns, axis=1).reshape(-1))
        sizes.append(np.full(times, len(chosen), dtype=np.int64))
    return Packs(np.concatenate(members).astype(np.int64), _offsets(np.concatenate(sizes)))


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _by_row(order: Ints, row_of: Ints, num_rows: int) -> Packs:
    grouped = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=num_rows) if len(row_of) else np.zeros(0, dtype=np.int64)
    return Packs(order[grouped].astype(np.int64), _offsets(counts))


def split_rows(lengths: Ints, capacity: int) -> Segments:
    """Concatenate the documents in order and cut every `capacity` tokens; only the last row is short."""
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
    """The segments of packs whose units are `documents_per_unit` consecutive whole documents."""
    documents = (packs.members[:, None] * documents_per_unit + np.arange(documents_per_unit)).reshape(-1)
    return Segments(documents, np.zeros_like(documents), lengths[documents], packs.offsets * documents_per_unit)


def single_rows(num_units: int) -> Packs:
    """One unit per row, in order."""
    return Packs(np.arange(num_units, dtype=np.int64), np.arange(num_units + 1, dtype=np.int64))


def efficiency(lengths: Ints, num_rows: int, capacity: int) -> float:
    """Share of the packed rows' tokens that are real."""
    return float(lengths.sum()) / (num_rows * capacity) if num_rows else 1.0

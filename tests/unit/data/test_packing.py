"""Packing: whole documents, no row too long, few rows, the same rows every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.preparation.packing import (
    Packs,
    best_fit,
    efficiency,
    exact_fill,
    pack,
    single_rows,
    split_rows,
    whole_rows,
)

lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=80), st.just(capacity))
)


def assert_whole(packs: Packs, lengths: np.ndarray, capacity: int) -> None:
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[packs.members], packs.offsets[:-1])
    assert (np.diff(packs.offsets) > 0).all() and sums.max() <= capacity


@settings(max_examples=150, deadline=None)
@given(case=lengths_and_capacity)
def test_every_way_keeps_every_document_whole(case: tuple[list[int], int]) -> None:
    lengths, capacity = np.array(case[0], dtype=np.int64), case[1]
    ways = [way(lengths, capacity) for way in (best_fit, exact_fill, pack)]
    for packs in ways:
        assert_whole(packs, lengths, capacity)
    assert len(ways[2]) <= min(len(ways[0]), len(ways[1])) or len(ways[2]) <= -(-lengths.sum() // capacity) * 1.002
    again = pack(lengths, capacity)
    assert again.members.tolist() == ways[2].members.tolist() and again.offsets.tolist() == ways[2].offsets.tolist()


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in every row by the definition: the longest first, each into the fullest row that takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(case=lengths_and_capacity)
def test_best_fit_is_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths = np.array(case[0], dtype=np.int64)
    packs = best_fit(lengths, case[1])
    rooms = sorted((case[1] - np.add.reduceat(lengths[packs.members], packs.offsets[:-1])).tolist())
    assert rooms == plain_best_fit(case[0], case[1])


def test_long_rows_use_every_word_of_the_room_set() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 3000)
    packs = best_fit(lengths, 20_000)
    assert_whole(packs, lengths, 20_000)
    assert efficiency(lengths, len(packs), 20_000) > 0.998


@pytest.mark.parametrize("capacity", [1024, 2048])
def test_alike_documents_leave_almost_nothing_empty(capacity: int) -> None:
    """Documents of like length are where best fit alone leaves 2 %."""
    lengths = np.clip(np.random.default_rng(1).normal(217, 60, 8000), 20, 600).astype(np.int64)
    packs = pack(lengths, capacity)
    assert_whole(packs, lengths, capacity)
    assert efficiency(lengths, len(packs), capacity) >= 0.995
    assert len(packs) < len(best_fit(lengths, capacity))


@settings(max_examples=80, deadline=None)
@given(case=lengths_and_capacity)
def test_split_rows_hold_every_token_once_and_in_order(case: tuple[list[int], int]) -> None:
    lengths, capacity = np.array(case[0], dtype=np.int64), case[1]
    segments = split_rows(lengths, capacity)
    flat = [
        (int(d), t)
        for d, start, stop in zip(segments.documents, segments.starts, segments.stops, strict=True)
        for t in range(start, stop)
    ]
    assert flat == [(d, t) for d, length in enumerate(case[0]) for t in range(length)]
    sizes = segments.stops - segments.starts
    rows = [int(sizes[a:b].sum()) for a, b in zip(segments.offsets[:-1], segments.offsets[1:], strict=True)]
    assert all(row == capacity for row in rows[:-1]) and 0 < rows[-1] <= capacity


def test_pairs_stand_together() -> None:
    lengths = np.array([3, 4, 5, 6, 2, 2], dtype=np.int64)
    segments = whole_rows(pack(lengths.reshape(-1, 2).sum(axis=1), 11), 2, lengths)
    rows = [segments.documents[a:b].tolist() for a, b in zip(segments.offsets[:-1], segments.offsets[1:], strict=True)]
    assert sorted(rows) == [[0, 1, 4, 5], [2, 3]]
    assert whole_rows(single_rows(3), 2, lengths).offsets.tolist() == [0, 2, 4, 6]

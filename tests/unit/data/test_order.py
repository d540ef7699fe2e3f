"""The order of rows: a pure function of seed and step, the same for every world size, each row once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from data_parts import data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.order import (
    FILLER,
    BatchOrder,
    Order,
    TokenBudgetOrder,
    make_order,
    permutation,
    rank_slices,
    steps_per_epoch,
)


def lengths_of(rows: int) -> np.ndarray:
    return (permutation(rows, 3, "lengths") % 97 + 1).astype(np.int64)


def orders(rows: int, size: int, seed: int) -> list[Order]:
    lengths = lengths_of(rows)
    return [
        BatchOrder(rows, size, seed),
        BatchOrder(rows, size, seed, lengths=lengths),
        BatchOrder(rows, size, seed, lengths=lengths, group_by_length=True),
        TokenBudgetOrder(lengths, size, seed, tokens_per_batch=200),
    ]


def real(indices: np.ndarray) -> list[int]:
    return indices[indices != FILLER].tolist()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 300), size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_every_epoch_takes_every_row_once(rows: int, size: int, seed: int) -> None:
    for order in orders(rows, size, seed):
        for epoch in range(2):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            taken = [row for step in steps for row in real(order.global_batch(step))]
            assert sorted(taken) == list(range(rows))
            assert all(order.epoch(step) == epoch for step in steps)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 200), size=st.integers(1, 24), world=st.integers(1, 5), micro=st.integers(1, 4))
def test_ranks_share_the_same_global_batch_and_have_the_same_number_of_micro_batches(
    rows: int, size: int, world: int, micro: int
) -> None:
    for order in orders(rows, size, 7):
        own = 1 if isinstance(order, TokenBudgetOrder) else micro
        for step in (0, order.steps_per_epoch - 1):
            shares = [order.micro_batches(step, rank=rank, world_size=world, micro_size=own) for rank in range(world)]
            assert len({len(share) for share in shares}) == 1
            together = [row for share in shares for batch in share for row in real(batch)]
            assert sorted(together) == sorted(real(order.global_batch(step)))
            assert all(len(batch) > 0 for share in shares for batch in share)


def test_micro_batch_m_of_rank_r_is_slice_m_times_world_plus_r() -> None:
    batch = np.arange(16)
    assert [part.tolist() for part in rank_slices(batch, rank=1, world_size=2, micro_size=2)] == [
        [2, 3],
        [6, 7],
        [10, 11],
        [14, 15],
    ]
    assert [part.tolist() for part in rank_slices(np.arange(10), rank=2, world_size=3, micro_size=2)] == [
        [4, 5],
        [-1, -1],
    ]


def test_ten_rows_on_three_ranks() -> None:
    order = BatchOrder(10, 6, 0)
    assert order.steps_per_epoch == 2 == steps_per_epoch(10, 6)
    last = [order.micro_batches(1, rank=rank, world_size=3, micro_size=2) for rank in range(3)]
    assert [[len(batch) for batch in share] for share in last] == [[2], [2], [2]]
    assert sum(row != FILLER for share in last for batch in share for row in batch) == 4


def test_the_order_is_the_same_on_every_machine() -> None:
    """Golden: a change here makes every running job's data order another one."""
    assert permutation(10, 0, "order:0").tolist() == GOLDEN
    assert BatchOrder(10, 4, 0).global_batch(0).tolist() == GOLDEN[:4]
    assert BatchOrder(10, 4, 0).global_batch(2).tolist() == [*GOLDEN[8:], FILLER, FILLER]
    assert BatchOrder(10, 4, 1).global_batch(0).tolist() != GOLDEN[:4]


GOLDEN = [6, 2, 7, 8, 4, 1, 5, 0, 3, 9]


def test_seeking_makes_the_batches_that_walking_makes() -> None:
    for walked, sought in zip(orders(100, 8, 5), orders(100, 8, 5), strict=True):
        batches = [walked.global_batch(step).tolist() for step in range(40)]
        for step in (39, 0, 17, 25, 13):
            assert sought.global_batch(step).tolist() == batches[step]


@pytest.mark.parametrize("rows", [64, 65, 71])
def test_the_longest_row_comes_first_in_the_first_epoch_alone(rows: int) -> None:
    lengths = lengths_of(rows)
    for group in (False, True):
        order = BatchOrder(rows, 8, 11, lengths=lengths, group_by_length=group)
        assert lengths[order.global_batch(0)].max() == lengths.max()
    plain, first = BatchOrder(rows, 8, 11), BatchOrder(rows, 8, 11, lengths=lengths)
    second_epoch = range(plain.steps_per_epoch, 2 * plain.steps_per_epoch)
    assert all(plain.global_batch(k).tolist() == first.global_batch(k).tolist() for k in second_epoch)
    budget = TokenBudgetOrder(lengths, 2, 11, tokens_per_batch=200)
    padded = [
        len(batch) * lengths[batch].max() for batch in budget.micro_batches(0, rank=0, world_size=1, micro_size=1)
    ]
    every = [
        len(batch) * lengths[batch].max()
        for step in range(budget.steps_per_epoch)
        for batch in budget.micro_batches(step, rank=0, world_size=1, micro_size=1)
        if batch[0] != FILLER
    ]
    assert max(padded) == max(every)


def test_grouping_by_length_leaves_little_padding() -> None:
    lengths = lengths_of(4000)
    grouped, random = (BatchOrder(4000, 8, 0, lengths=lengths, group_by_length=group) for group in (True, False))

    def share(order: BatchOrder) -> float:
        batches = [lengths[order.global_batch(step)] for step in range(order.steps_per_epoch)]
        return sum(int(batch.sum()) for batch in batches) / sum(len(batch) * int(batch.max()) for batch in batches)

    assert share(grouped) > 0.95 > 0.7 > share(random)


def test_token_budget_holds() -> None:
    lengths = lengths_of(1000)
    order = TokenBudgetOrder(lengths, 4, 0, tokens_per_batch=512)
    batches = [
        b for k in range(order.steps_per_epoch) for b in order.micro_batches(k, rank=0, world_size=1, micro_size=1)
    ]
    padded = [len(batch) * int(lengths[batch].max()) for batch in batches if batch[0] != FILLER]
    assert max(padded) <= 512
    assert sum(lengths) / sum(padded) > 0.9


def test_make_order_follows_the_configuration() -> None:
    lengths = lengths_of(50)
    assert isinstance(
        make_order(data_config(tokens_per_batch=4096), lengths=lengths, global_size=4, seed=0), TokenBudgetOrder
    )
    grouped = make_order(data_config(group_by_length=True), lengths=lengths, global_size=4, seed=0)
    assert isinstance(grouped, BatchOrder) and grouped.group_by_length

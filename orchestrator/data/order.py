"""Assigns rows to global batches: a pure function of (data, seed, step). Must not import torch."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.config.data import DataConfig
from orchestrator.schedule import steps_per_epoch

Indices = npt.NDArray[np.int64]
FILLER = -1
"""Index of a row without trained tokens, which fills the last batch of an epoch."""
WINDOW_BATCHES = 64
"""Rows are sorted by length within windows of this many batches: enough for similar lengths, few enough to stay
random."""


class Order(Protocol):
    """The rows of every step. Seeking to a step costs the same for every step."""

    steps_per_epoch: int

    def epoch(self, step_index: int) -> int:
        """The epoch (from 0) that step `step_index` (from 0) belongs to."""
        ...

    def global_batch(self, step_index: int) -> Indices:
        """The row indices of step `step_index` (from 0), -1 for fillers; the same for every world size."""
        ...

    def micro_batches(self, step_index: int, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
        """What one rank computes in a step, in order; every rank has the same number."""
        ...


def make_order(config: DataConfig, *, lengths: Indices, global_size: int, seed: int) -> Order:
    """The order that a data configuration asks for, over trainable rows of these lengths."""
    if config.tokens_per_batch is not None:
        return TokenBudgetOrder(lengths, global_size, seed, tokens_per_batch=config.tokens_per_batch)
    return BatchOrder(len(lengths), global_size, seed, lengths=lengths, group_by_length=config.group_by_length)


def permutation(rows: int, seed: int, stream: str) -> Indices:
    """The numbers 0..rows-1 in an order fixed by (seed, stream), the same on every machine and numpy version.

    Sorts raw Philox words, whose stream numpy guarantees, which it does not for Generator.permutation.
    """
    key = np.frombuffer(hashlib.blake2b(f"{stream}:{seed}".encode(), digest_size=16).digest(), dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(rows)
    # Stable: the order of equal words must not depend on the sorting algorithm of the machine.
    return np.argsort(words, kind="stable").astype(np.int64)


class BatchOrder:
    """Batches of `global_size` rows; each epoch has its own permutation."""

    def __init__(
        self, rows: int, global_size: int, seed: int, *, lengths: Indices | None = None, group_by_length: bool = False
    ) -> None:
        """`lengths` puts the batch with the longest row first in the first epoch, and serves `group_by_length`."""
        assert rows > 0 and global_size > 0
        assert not group_by_length or lengths is not None, "grouping by length needs the lengths"
        self.rows, self.global_size, self.seed = rows, global_size, seed
        self.lengths, self.group_by_length = lengths, group_by_length
        self.steps_per_epoch = steps_per_epoch(rows, global_size)
        self._epoch_order = lru_cache(maxsize=2)(self._order_of_epoch)

    def epoch(self, step_index: int) -> int:
        """The epoch (from 0) that step `step_index` (from 0) belongs to."""
        return step_index // self.steps_per_epoch

    def global_batch(self, step_index: int) -> Indices:
        """The `global_size` row indices of step `step_index` (from 0); -1 for fillers of an epoch's last batch."""
        epoch, batch = divmod(step_index, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        return order[batch * self.global_size : (batch + 1) * self.global_size]

    def micro_batches(self, step_index: int, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
        """What one rank computes in a step: micro-batch m is slice m * world_size + rank of the global batch."""
        return rank_slices(self.global_batch(step_index), rank=rank, world_size=world_size, micro_size=micro_size)

    def _order_of_epoch(self, epoch: int) -> Indices:
        order = permutation(self.rows, self.seed, f"order:{epoch}")
        if self.group_by_length:
            assert self.lengths is not None
            order = _grouped(order, self.lengths, self.global_size, self.seed, epoch)
        filled = np.full(self.steps_per_epoch * self.global_size, FILLER, dtype=np.int64)
        # The fillers come last, so that whole batches of an epoch do not depend on them.
        filled[: self.rows] = order
        if epoch == 0 and self.lengths is not None:
            _longest_first(filled, self.lengths, self.global_size)
        # The array is cached and shared: a caller that changed it would change later batches.
        filled.flags.writeable = False
        return filled


class TokenBudgetOrder:
    """Batches of rows of similar length whose padded size is at most `tokens_per_batch`; a step takes `global_size` of
    them.

    The batches are made once from the seed; each epoch shuffles them, so that every epoch has the same number of steps.
    """

    def __init__(self, lengths: Indices, global_size: int, seed: int, *, tokens_per_batch: int) -> None:
        assert len(lengths) > 0 and global_size > 0
        self.global_size, self.seed, self.lengths = global_size, seed, lengths
        self._batches = _budgeted(permutation(len(lengths), seed, "order:0"), lengths, tokens_per_batch)
        self.steps_per_epoch = steps_per_epoch(len(self._batches), global_size)
        self.fillers = self.steps_per_epoch * global_size - len(self._batches)
        self._epoch_order = lru_cache(maxsize=2)(self._order_of_epoch)

    def epoch(self, step_index: int) -> int:
        """The epoch (from 0) that step `step_index` (from 0) belongs to."""
        return step_index // self.steps_per_epoch

    def global_batch(self, step_index: int) -> Indices:
        """The row indices of all batches of a step; -1 for a filler batch."""
        return np.concatenate(self._step(step_index))

    def micro_batches(self, step_index: int, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
        """Batch m * world_size + rank of the step, for every m; each is one micro-batch (`micro_size` is 1)."""
        assert micro_size == 1, "with tokens_per_batch a micro-batch is one batch of the budget"
        batches = self._step(step_index)
        batches += [np.array([FILLER])] * (-len(batches) % world_size)
        return batches[rank::world_size]

    def _step(self, step_index: int) -> list[Indices]:
        epoch, step = divmod(step_index, self.steps_per_epoch)
        chosen = self._epoch_order(epoch)[step * self.global_size : (step + 1) * self.global_size].tolist()
        return [self._batches[i] if i != FILLER else np.array([FILLER]) for i in chosen]

    def _order_of_epoch(self, epoch: int) -> Indices:
        order = permutation(len(self._batches), self.seed, f"batches:{epoch}")
        filled = np.full(self.steps_per_epoch * self.global_size, FILLER, dtype=np.int64)
        filled[: len(order)] = order
        if epoch == 0:
            padded = np.array([len(rows) * int(self.lengths[rows].max()) for rows in self._batches], dtype=np.int64)
            _longest_first(filled, padded, self.global_size)
        return filled


def rank_slices(batch: Indices, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
    """Slices of a global batch for one rank; a batch that does not divide evenly is padded with -1."""
    per_round = world_size * micro_size
    short = -len(batch) % per_round
    whole = np.concatenate([batch, np.full(short, FILLER, dtype=np.int64)]) if short else batch
    rounds = whole.reshape(-1, world_size, micro_size)
    return [rounds[m, rank] for m in range(len(rounds))]


def _longest_first(order: Indices, lengths: Indices, global_size: int) -> None:
    """Swap the batch with the longest row to the front, in place, so that running out of memory shows in the first
    minute.
    """
    row_lengths = np.where(order == FILLER, -1, lengths[order])
    position = int(row_lengths.argmax())
    batches = order.reshape(-1, global_size)
    where = position // global_size
    if (batches[where] != FILLER).all():
        batches[[0, where]] = batches[[where, 0]]
    else:
        order[[0, position]] = order[[position, 0]]


def _sorted_in_windows(order: Indices, lengths: Indices, window: int) -> Indices:
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    return np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])


def _grouped(order: Indices, lengths: Indices, global_size: int, seed: int, epoch: int) -> Indices:
    """Sort by length within windows, then shuffle the full batches; a short last batch stays last."""
    ordered = _sorted_in_windows(order, lengths, WINDOW_BATCHES * global_size)
    whole = len(ordered) // global_size
    batches = ordered[: whole * global_size].reshape(whole, global_size)
    shuffled = batches[permutation(whole, seed, f"batches:{epoch}")].reshape(-1)
    return np.concatenate([shuffled, ordered[whole * global_size :]])


def _budgeted(order: Indices, lengths: Indices, tokens_per_batch: int) -> list[Indices]:
    """Consecutive rows of similar length while their number times the longest fits the budget; a longer row forms its
    own group.
    """
    rows_per_batch = max(1, tokens_per_batch // max(1, int(lengths.mean())))
    ordered = _sorted_in_windows(order, lengths, WINDOW_BATCHES * rows_per_batch)
    batches: list[Indices] = []
    start, longest = 0, 0
    for end, length in enumerate(lengths[ordered].tolist()):
        longest = max(longest, length)
        if end > start and (end + 1 - start) * longest > tokens_per_batch:
            batches.append(ordered[start:end])
            start, longest = end, length
    return [*batches, ordered[start:]]

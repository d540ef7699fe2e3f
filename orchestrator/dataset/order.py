"""Which rows stand in which global batch: a pure function of (rows, seed, step); must not import torch."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
FILLER = -1
"""Index of a row without trained tokens, which fills the last batch of an epoch."""


def steps_per_epoch(rows: int, global_size: int) -> int:
    """Optimizer steps of one pass: the last batch is filled up, no row is dropped."""
    return -(-rows // global_size)


def permutation(rows: int, seed: int, stream: str) -> Indices:
    """The numbers 0..rows-1 in an order fixed by (seed, stream), the same on every machine and numpy version.

    Sorts raw Philox words, whose stream numpy guarantees, which it does not for Generator.permutation.
    """
    key = np.frombuffer(hashlib.blake2b(f"{stream}:{seed}".encode(), digest_size=16).digest(), dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int64)


class BatchOrder:
    """The rows of every global batch; a filler is -1. Seeking to a step costs the same for every step."""

    def __init__(
        self, rows: int, global_size: int, seed: int, *, lengths: npt.NDArray[np.int64] | None = None, group_by_length: bool = False
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
        """The `global_size` row indices of step `step_index` (from 0); -1 where the last batch of an epoch is filled."""
        epoch, batch = divmod(step_index, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        return order[batch * self.global_size : (batch + 1) * self.global_size]

    def micro_batches(self, step_index: int, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
        """What one rank computes in a step: micro-batch m is slice m * world_size + rank of the global batch.

        The global batch is the same for every world size, and every rank has the same number of micro-batches.
        """
        return rank_slices(self.global_batch(step_index), rank=rank, world_size=world_size, micro_size=micro_size)

    def _order_of_epoch(self, epoch: int) -> Indices:
        order = permutation(self.rows, self.seed, f"order:{epoch}")
        if self.group_by_length:
            assert self.lengths is not None
            order = _grouped(order, self.lengths, self.global_size, self.seed, epoch)
        filled = np.full(self.steps_per_epoch * self.global_size, FILLER, dtype=np.int64)
        filled[: self.rows] = order
        if epoch == 0 and self.lengths is not None:
            _longest_first(filled, self.lengths, self.global_size)
        filled.flags.writeable = False
        return filled


def rank_slices(batch: Indices, *, rank: int, world_size: int, micro_size: int) -> list[Indices]:
    """Slices of a global batch for one rank; a batch that does not divide is filled with -1 at its end."""
    per_round = world_size * micro_size
    short = -len(batch) % per_round
    whole = np.concatenate([batch, np.full(short, FILLER, dtype=np.int64)]) if short else batch
    rounds = whole.reshape(-1, world_size, micro_size)
    return [rounds[m, rank] for m in range(len(rounds))]


def _longest_first(order: Indices, lengths: npt.NDArray[np.int64], global_size: int) -> None:
    """Swaps the batch with the longest row to the front, in place: a memory fault comes in the first minute."""
    row_lengths = np.where(order == FILLER, -1, lengths[order])
    position = int(row_lengths.argmax())
    batches = order.reshape(-1, global_size)
    where = position // global_size
    if (batches[where] != FILLER).all():
        batches[[0, where]] = batches[[where, 0]]
    else:
        order[[0, position]] = order[[position, 0]]


def _grouped(order: Indices, lengths: npt.NDArray[np.int64], global_size: int, seed: int, epoch: int) -> Indices:
    """Sorts by length within windows of 64 batches, then shuffles the whole batches; a short last batch stays last."""
    window = 64 * global_size
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    whole = len(ordered) // global_size
    batches = ordered[: whole * global_size].reshape(whole, global_size)
    shuffled = batches[permutation(whole, seed, f"batches:{epoch}")].reshape(-1)
    return np.concatenate([shuffled, ordered[whole * global_size :]])

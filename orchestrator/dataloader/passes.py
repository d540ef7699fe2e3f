"""Which rows share a forward pass when nothing is trained. Must not know models or objectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from orchestrator.dataloader.prepared_rows import PreparedRows

CPU_PASS_TOKENS = 1024
"""Padded tokens of a pass on a CPU. Two AVX2 cores score 335 tokens/s of SmolLM2-135M in passes of 300, 399 in those of
1,060 and 274 in those of 2,700: by then the activations of a layer have left the last cache."""


class Ranks(Protocol):
    """The ranks that share a pass."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def passes(ranks: Ranks, rows: PreparedRows, chosen: range, *, micro_size: int) -> Iterator[tuple[list[int], int]]:
    """(this rank's rows of a pass, number of chosen rows done on all ranks after it), as often on every rank.

    Rows of similar length are batched together to reduce padding. Without gradients a pass may hold more rows than a
    training step: on a GPU as many tokens as the plan reserves for `micro_size` of the longest rows. Never fewer rows.
    """
    batches = _batches(ranks.device, rows, chosen, micro_size=micro_size)
    done = 0
    for start in range(0, len(batches), ranks.world_size):
        together = batches[start : start + ranks.world_size]
        done += sum(len(batch) for batch in together)
        # A filler if a rank has no batch: every rank must enter every collective.
        yield (together[ranks.rank] if ranks.rank < len(together) else [-1]), done


def _batches(device: torch.device, rows: PreparedRows, chosen: range, *, micro_size: int) -> list[list[int]]:
    """The rows of each forward pass. Ranks receive whole batches: a row's padding, and its loss to the bit, are equal
    on any number of ranks, so that one process can prove what several have scored.
    """
    sequences = 1 if rows.is_packed else rows.meta.documents_per_unit
    widest = CPU_PASS_TOKENS if device.type == "cpu" else micro_size * sequences * rows.meta.max_length
    lengths = np.asarray(rows.lengths[chosen.start : chosen.stop])
    order = (
        chosen.start + np.argsort(-lengths, kind="stable")
    ).tolist()  # longest first: running out of memory shows at once
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        fitting = widest // (sequences * max(1, int(rows.lengths[order[start]])))
        batches.append(order[start : start + max(micro_size, fitting)])
        start += len(batches[-1])
    return batches

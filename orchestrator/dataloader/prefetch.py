"""Batches on the device, the next one made while the present one is computed; must not know models or files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from orchestrator.dataloader.protocols import MicroBatch, Rows


class Batches:
    """Owns a thread that reads ahead. What is made, and in which order, does not depend on it."""

    def __init__(self, rows: Rows, device: torch.device, *, reads_ahead: bool = True) -> None:
        """`reads_ahead` is for rows that stay as they are: those that a step makes for itself are not there before it."""
        self._rows, self._device, self._reads_ahead = rows, device, reads_ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches", initializer=self._settle)
        self._expected: tuple[tuple[int, ...], Future[MicroBatch]] | None = None

    def take(self, indices: Sequence[int], *, then: Sequence[int] | None = None) -> MicroBatch:
        """The batch of these rows; `then` are those that will be asked for next, if it is known."""
        wanted, expected = _key(indices), self._expected
        self._expected = None
        batch = expected[1].result() if expected is not None and expected[0] == wanted else self._made(wanted)
        if then is not None and self._reads_ahead:
            self._expected = (_key(then), self._thread.submit(self._made, _key(then)))
        return batch.to(self._device)

    def close(self) -> None:
        """Ends the thread; what it was making is forgotten."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _settle(self) -> None:
        """A new thread's GPU is the first one, whatever the rank's is; a process alone has no number for it."""
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)

    def _made(self, indices: tuple[int, ...]) -> MicroBatch:
        """For a GPU in pinned memory, so that the host does not wait for the copy."""
        batch = self._rows.batch(indices)
        return batch.pinned() if self._device.type == "cuda" else batch


def _key(indices: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(index) for index in indices)

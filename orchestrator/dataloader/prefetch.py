"""Batches on the device, the next one prepared while the current one is computed; must not know models or files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from orchestrator.dataloader.protocols import MicroBatch, Rows


class Batches:
    """Owns a prefetch thread. The content and order of batches do not depend on it."""

    def __init__(self, rows: Rows, device: torch.device, *, reads_ahead: bool = True) -> None:
        """Disable `reads_ahead` for rows generated during the step (rollouts); they do not exist in advance."""
        self._rows, self._device, self._reads_ahead = rows, device, reads_ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches", initializer=self._settle)
        self._expected: tuple[tuple[int, ...], Future[MicroBatch]] | None = None

    def take(self, indices: Sequence[int], *, then: Sequence[int] | None = None) -> MicroBatch:
        """The batch of these rows; `then` are the rows requested next, if known."""
        wanted, expected = _key(indices), self._expected
        self._expected = None
        batch = expected[1].result() if expected is not None and expected[0] == wanted else self._made(wanted)
        if then is not None and self._reads_ahead:
            self._expected = (_key(then), self._thread.submit(self._made, _key(then)))
        return batch.to(self._device)

    def close(self) -> None:
        """End the thread and discard the batch it was preparing."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _settle(self) -> None:
        """Select the rank's GPU: a new thread uses the first one. A single process has no device index."""
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)

    def _made(self, indices: tuple[int, ...]) -> MicroBatch:
        """Build the batch; for a GPU in pinned memory, so that the host does not wait for the copy."""
        # On the prefetch thread, while a step is computed on the device: work of the host only.
        batch = self._rows.batch(indices)
        return batch.pinned() if self._device.type == "cuda" else batch


def _key(indices: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(index) for index in indices)

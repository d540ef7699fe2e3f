"""What a loop takes batches from, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class MicroBatch(Protocol):
    """What a loop moves to its device; its objective knows the rest."""

    def to(self, device: torch.device | str) -> MicroBatch: ...
    def pinned(self) -> MicroBatch:
        """In memory from which a GPU copies by itself, so that nobody waits for the copy."""
        ...


class Rows(Protocol):
    """What a loop takes batches from."""

    @property
    def trained_tokens(self) -> Any: ...
    @property
    def lengths(self) -> Any: ...
    def documents_in(self, indices: Sequence[int]) -> int: ...
    def batch(self, indices: Sequence[int]) -> MicroBatch: ...
    def row_ids(self, index: int) -> tuple[int, ...]: ...

"""The interface from which the loop takes batches, whatever they contain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class MicroBatch(Protocol):
    """What the loop moves to its device; its contents are known to the objective only."""

    def to(self, device: torch.device | str) -> MicroBatch: ...
    def pinned(self) -> MicroBatch:
        """In pinned memory, from which a GPU copies without the host waiting."""
        ...


class Rows(Protocol):
    """The rows from which the loop takes batches."""

    @property
    def trained_tokens(self) -> Any: ...
    @property
    def lengths(self) -> Any: ...
    def documents_in(self, indices: Sequence[int]) -> int: ...
    def batch(self, indices: Sequence[int]) -> MicroBatch: ...
    def row_ids(self, index: int) -> tuple[int, ...]: ...

"""A phase in bytes; must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

BytesByPart = dict[str, float]
"""Name -> bytes."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The largest moment of a phase."""

    name: str
    static: BytesByPart
    """What persists between the phases."""
    changing: BytesByPart
    """What is allocated and freed within a step, which fragments the allocator's blocks."""
    host: BytesByPart

    @property
    def device_total(self) -> float:
        return sum(self.static.values()) + sum(self.changing.values())

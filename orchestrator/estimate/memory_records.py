"""Records of the forecast: memory by phase and part, in GiB. Must not import torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import Section

Verdict = Literal["FIT", "TIGHT", "NO"]
"""The high estimate fits; only the low or expected one does; not even the low one."""


class PhaseForecast(Section):
    """The largest moment of one phase on one rank, GiB."""

    name: str
    device: dict[str, float]
    """Part -> what is expected."""
    host: dict[str, float]
    """The same in the host's memory, of one rank."""
    low: float
    expected: float
    high: float
    host_expected: float


class MemoryForecast(Section):
    """What one rank needs, GiB."""

    weights: float
    gradients: float
    optimizer: float
    total: float
    """Weights, gradients and optimizer on the device, between steps."""
    phases: tuple[PhaseForecast, ...]
    binding: str
    """The phase that needs most."""
    low: float
    expected: float
    high: float
    host: float
    """Of one rank, in the phase that needs most."""
    memory_gib: float | None
    """The device's memory; null if unknown."""
    node_gib: float
    """All ranks of a node in the host's memory, in the phase that needs most."""
    node_memory_gib: float | None
    """Host memory of a node available to the job; null if unknown, and then not checked."""
    verdict: Verdict | None
    """The worse of device and host."""


HOST_UNCERTAINTY = 0.15
"""Of the host's share, on either side: libraries, page cache and pinned buffers differ by machine."""


def worse_of(device: Verdict | None, host: Verdict | None) -> Verdict | None:
    """The verdict of a rank; none if the device's memory is unknown."""
    order: list[Verdict] = ["FIT", "TIGHT", "NO"]
    return device if device is None or host is None else max(device, host, key=order.index)


def verdict_of(low: float, high: float, memory_gib: float | None) -> Verdict | None:
    """Never FIT where it may not: only where the high estimate fits."""
    if memory_gib is None:
        return None
    if high <= memory_gib:
        return "FIT"
    return "NO" if low > memory_gib else "TIGHT"

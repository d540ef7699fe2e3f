"""Formats the memory forecast as text. Must not import torch."""

from __future__ import annotations

from rich.table import Table

from orchestrator.estimate.memory_records import MemoryForecast, PhaseForecast

MEANINGS = {
    "FIT": "the high estimate fits",
    "TIGHT": "it may fit: the low estimate does, the high one does not",
    "NO": "not even the low estimate fits",
}
WORDS = {"FIT": "fits", "TIGHT": "may not fit", "NO": "does not fit"}
NEGLIGIBLE_GIB = 0.005


def memory_sentence(memory: MemoryForecast | None) -> str:
    """The forecast in plain English: the need of one process, and whether it fits."""
    if memory is None:
        return "known once the base is fetched"
    needs = f"{memory.expected:.1f} GiB expected ({memory.low:.1f} to {memory.high:.1f})"
    if memory.verdict is None:
        return f"{needs}; the memory of the device is not known"
    return f"{WORDS[memory.verdict]}: {needs} of {memory.memory_gib:.1f}"


def memory_line(memory: MemoryForecast | None) -> str:
    """The forecast in a sentence."""
    if memory is None:
        return "known once the base is fetched"
    forecast = f"{memory.expected:.2f} GiB ({memory.low:.2f} to {memory.high:.2f}) in phase {memory.binding}; states {memory.total:.2f}"
    if memory.verdict is None:
        return f"{forecast}; set cluster.hardware.memory_gib to see whether it fits"
    host = (
        ""
        if memory.node_memory_gib is None
        else f"; host of a node {memory.node_gib:.0f} of {memory.node_memory_gib:g}"
    )
    return f"{memory.verdict} of {memory.memory_gib:.4g} GiB: {forecast}{host}"


def memory_table(memory: MemoryForecast) -> Table:
    """Phases and their parts, GiB of one rank; the binding phase is marked."""
    table = Table(
        box=None, pad_edge=False, title_justify="left", title="memory by phase, GiB of one rank", title_style="dim"
    )
    table.add_column("phase", style="cyan", no_wrap=True)
    table.add_column("expected", justify="right", no_wrap=True)
    table.add_column("low-high", justify="right", no_wrap=True)
    table.add_column("host", justify="right", no_wrap=True)
    table.add_column("parts on the device", overflow="fold")
    for phase in memory.phases:
        is_binding = phase.name == memory.binding
        table.add_row(
            f"{phase.name} <" if is_binding else phase.name,
            f"{phase.expected:.2f}",
            f"{phase.low:.2f}-{phase.high:.2f}",
            f"{phase.host_expected:.1f}",
            _parts(phase),
            style="bold" if is_binding else None,
        )
    if memory.verdict is not None:
        table.caption = f"{memory.verdict}: {MEANINGS[memory.verdict]}"
        table.caption_justify = "left"
    return table


def _parts(phase: PhaseForecast) -> str:
    """The parts, largest first."""
    parts = sorted(phase.device.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size:.2f}" for name, size in parts if size >= NEGLIGIBLE_GIB)

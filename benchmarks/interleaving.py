"""Ways to do one thing, timed in turn in one run: medians, ratios to one of them, and how busy the machine was."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

BUSY_PERCENT = 10.0
"""Share of the time in which some process waits for a core, from which on wall-clock time says nothing."""


def pressure() -> float:
    """Percent of the last ten seconds in which some process waited for a core."""
    try:
        return float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 0.0


def settled_pressure(seconds: float = 30.0) -> float:
    """The pressure, once that of a run before has died away, or after so many seconds."""
    until = time.monotonic() + seconds
    while (busy := pressure()) > BUSY_PERCENT / 4 and time.monotonic() < until:
        time.sleep(1.0)
    return busy


def cpu_seconds() -> float:
    """CPU seconds of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """(units per wall second, units per CPU second) of work that answers its number of units."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    units = work()
    return units / (time.perf_counter() - wall), units / (cpu_seconds() - cpu)


def compare(ways: dict[str, Callable[[], int]], *, rounds: int, unit: str, reference: str) -> None:
    """Interleaved rounds of every way; medians and ratios to one of them."""
    busy = pressure()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(timed(work))
    medians = {
        name: tuple(statistics.median(column) for column in zip(*values, strict=True)) for name, values in found.items()
    }
    base = medians[reference]
    print(f"{'way':<34} {unit + '/s':>12} {'ratio':>6}   {unit + '/CPU s':>14} {'ratio':>6}   spread")
    for name, (wall, cpu) in medians.items():
        walls = [value for value, _ in found[name]]
        spread = (max(walls) - min(walls)) / wall
        print(f"{name:<34} {wall:12,.0f} {wall / base[0]:6.2f}   {cpu:14,.0f} {cpu / base[1]:6.2f}   {spread:.0%}")
    print(f"cores {os.cpu_count()}; waiting for a core before the start: {busy:.0f} % of the time")
    if busy > BUSY_PERCENT:
        print("the machine was busy: no verdict on wall seconds")

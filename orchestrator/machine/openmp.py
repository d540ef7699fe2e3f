"""How long OpenMP's threads spin for one another. Must not import torch: its libgomp reads the variable when it is loaded."""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = "GOMP_SPINCOUNT"
SPINS = "10000"
"""Rounds that a thread spins at a barrier before it sleeps. libgomp's own 300,000 take milliseconds, in which it keeps the
core from the very thread it waits for: next to one busy process on two cores a training step takes eight times as long with
them, and on an idle machine no less (`benchmarks/contention.py`)."""
CHOSEN_BY_USER = (SPIN_COUNT, "OMP_WAIT_POLICY")


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Set the spin count of this process and its children, unless the user chose one."""
    if not any(name in environment for name in CHOSEN_BY_USER):
        environment[SPIN_COUNT] = SPINS

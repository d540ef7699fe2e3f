"""How many rows are held out of train; must not import torch."""

from __future__ import annotations

from orchestrator.config.data import HeldOutConfig


def held_out_rows(rows: int, settings: HeldOutConfig) -> int:
    """Rows that a split by `fraction` takes out of `rows`: at least one, at most `max_rows`, and never all."""
    return min(settings.max_rows, max(1, round(rows * settings.fraction)), max(0, rows - 1))

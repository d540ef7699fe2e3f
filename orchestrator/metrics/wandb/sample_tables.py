"""Completions of samples.jsonl as W&B tables, each at its step. Must not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.metrics.jsonl import Row, Tail, step_of

KEY = "samples"
NOT_SHOWN = ("step", "attempt", "rewards")


@dataclass
class Samples:
    """Follows the file; a table is made once, when the row of its step is sent."""

    tail: Tail
    waiting: dict[int, list[Row]] = field(default_factory=dict[int, list[Row]])

    def take(self, step: int) -> dict[str, Any]:
        """The table of a step as part of its row; empty if there is none. The newest attempt at the step counts."""
        for row in self.tail.poll():
            if "step" in row:
                self.waiting.setdefault(step_of(row), []).append(row)
        rows = self.waiting.pop(step, [])
        newest = max((str(row.get("attempt")) for row in rows), key=_number, default="")
        cells = [_cells(row) for row in rows if str(row.get("attempt")) == newest]
        if not cells:
            return {}
        import wandb

        columns: list[Any] = list(dict.fromkeys(name for row in cells for name in row))
        return {KEY: wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in cells])}


def _cells(row: Row) -> dict[str, Any]:
    """Texts and numbers of a completion, each reward in a column of its own."""
    rewards = cast("dict[str, object]", row.get("rewards") or {})
    plain = {name: value for name, value in row.items() if name not in NOT_SHOWN}
    apart = {f"reward_{name}": value for name, value in rewards.items()}
    cells = {**plain, **apart}
    return {name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in cells.items()}


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1

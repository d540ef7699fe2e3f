"""Compares the plan with what runs measured: speed, memory, goodput. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import RunFolderError
from orchestrator.files.atomic import read_json
from orchestrator.planning.measured_speed import Measured, read_measured
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.goodput import TimeSpent, time_spent

MOST_TIMES = 4
"""Upper limit of the stages whose time `status` breaks down; for more, ask about one run."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Planned and actual needs of a stage."""

    run: str
    stage: str
    measured: Measured
    planned_tokens_per_second: float | None
    planned_step_seconds: float | None
    planned_memory_gib: float | None
    spent: TimeSpent | None


def comparisons(runs: Sequence[RunFolder]) -> list[Comparison]:
    """One entry for every stage with a measurement."""
    return [found for run in runs for found in _of_run(run)]


def _of_run(run: RunFolder) -> list[Comparison]:
    try:
        plan: Any = read_json(run.plan)
        stages: list[dict[str, Any]] = list(plan["stages"])
    except (RunFolderError, KeyError, TypeError):
        return []
    return [found for stage in stages if (found := _of_stage(run, stage)) is not None]


def _of_stage(run: RunFolder, planned: dict[str, Any]) -> Comparison | None:
    folder = run.stage(str(planned["name"]))
    measured = read_measured(folder)
    if measured is None:
        return None
    time: dict[str, Any] = planned.get("time") or {}
    memory: dict[str, Any] = planned.get("memory") or {}
    return Comparison(
        run=run.root.name,
        stage=str(planned["name"]),
        measured=measured,
        planned_tokens_per_second=time.get("tokens_per_second"),
        planned_step_seconds=time.get("step_seconds"),
        planned_memory_gib=memory.get("expected"),
        spent=time_spent(folder),
    )

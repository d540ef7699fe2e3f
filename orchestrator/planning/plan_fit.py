"""Refuses a stage that would train to its end and could not be written or proven there. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import ConfigError
from orchestrator.planning.records import Plan, StagePlan

ENDS = ("write", "prove")
"""Phases that come after all device hours are spent. One that comes earlier shows at once, and is a warning."""


def refuse_unprovable(plan: Plan) -> None:
    """Raise ConfigError with every stage whose end cannot fit into the known memory of its devices, even at the least."""
    problems = [problem for stage in plan.stages for problem in _problems(stage)]
    if problems:
        raise ConfigError(problems)


def _problems(stage: StagePlan) -> Iterator[str]:
    memory = stage.memory
    if memory is None or memory.memory_gib is None:
        return
    ends = [phase for phase in memory.phases if phase.name in ENDS]
    worst = max(ends, key=lambda phase: phase.low, default=None)
    if worst is not None and worst.low > memory.memory_gib:
        yield (
            f"stages.{stage.name}: its artifact could not be written and proven: phase {worst.name} needs at least {worst.low:.1f} GiB "
            f"on each device of {memory.memory_gib:g}; type sharding=zero3 with more ranks, or see what fits with "
            "`plan advise=true` and the same overrides"
        )

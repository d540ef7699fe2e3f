"""The side effects of the training loop, announced as phases of the run's progress. Must not know files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from orchestrator.metrics import phases as phase
from orchestrator.metrics.phases import Phases
from orchestrator.training.loop_state import LoopCallbacks, Progress

T = TypeVar("T")


def announced(hooks: LoopCallbacks, phases: Phases, *, total_steps: int) -> LoopCallbacks:
    """The same side effects; the phase becomes training once the first step is done."""

    def rows_consumed(step: int, rows: Sequence[int]) -> None:
        hooks.rows_consumed(step, rows)
        # The first step compiles kernels and fills caches: its duration does not predict the next one's.
        if phases.is_at(phase.FIRST_STEP):
            phases.begin(phase.TRAINING, total=total_steps, unit=phase.STEPS)
        phases.advance(step, unit=phase.STEPS)

    return replace(
        hooks,
        evaluate=_within(phases, phase.EVALUATION, hooks.evaluate, unit=phase.ROWS),
        save=_within(phases, phase.SAVING, hooks.save),
        rehearse=_within(phases, phase.TRIAL, hooks.rehearse),
        rows_consumed=rows_consumed,
    )


def _within(phases: Phases, name: str, act: Callable[[Progress], T], *, unit: str = "") -> Callable[[Progress], T]:
    def acted(at: Progress) -> T:
        with phases.during(name, unit=unit):
            return act(at)

    return acted

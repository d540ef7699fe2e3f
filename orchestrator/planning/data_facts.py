"""What is known of the data of a stage before it is planned. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.data.prepared.statistics import PreparedFacts
from orchestrator.estimate.step_time import Rate
from orchestrator.planning.measured_speed import Measured


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a look at a stage's data, and at runs beside it, found; rows are None where only a download can tell."""

    train_rows: int | None
    evaluation_rows: int | None
    format: str | None
    bytes: int
    prepared: PreparedFacts | None = None
    """None where the rows are not prepared yet."""
    measured: tuple[Measured, str] | None = None
    """The newest measurement that holds for the stage, and the run that made it."""
    templated: str | None = None
    """What to type where prompts go past the base's chat template; None where they go through it, or there is none."""
    probed: Rate | None = None
    """What this machine's processor was measured to compute; None where the ranks run elsewhere, or nothing was measured."""
    has_liger: bool = False
    """Whether Liger's kernels are installed where the plan is made."""

"""Facts about the data of a stage before it is planned. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.data.prepared.statistics import PreparedFacts
from orchestrator.estimate.step_time import Rate
from orchestrator.planning.measured_speed import Measured


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Facts found in a stage's data and in neighbouring runs; rows are None if they are unknown before a download."""

    train_rows: int | None
    evaluation_rows: int | None
    format: str | None
    bytes: int
    prepared: PreparedFacts | None = None
    """None until the rows are prepared."""
    measured: tuple[Measured, str] | None = None
    """The newest measurement that applies to the stage, and the run that made it."""
    templated: str | None = None
    """What to type if prompts bypass the base's chat template; None if they use it, or there is none."""
    probed: Rate | None = None
    """Measured speed of this machine's processor; None if the ranks run elsewhere, or nothing was measured."""
    has_liger: bool = False
    """Whether Liger's kernels are installed on the planning machine."""

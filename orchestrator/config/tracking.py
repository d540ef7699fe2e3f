"""Where metrics go beside the run folder. Must not import torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import PositiveFloat, Section


class WandbTracking(Section):
    """Weights & Biases."""

    kind: Literal["wandb"]
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    """`auto` is online where there is a key, else offline."""
    finish_timeout_seconds: PositiveFloat
    """How long the end of a stage waits for W&B."""
    init_timeout_seconds: PositiveFloat
    """How long the server may take to answer at the start; training does not wait for it."""


class NoTracking(Section):
    """metrics.jsonl alone."""

    kind: Literal["none"]

"""Where metrics are sent besides the run folder. Must not import torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import PositiveFloat, Section


class WandbTracking(Section):
    """Weights & Biases."""

    kind: Literal["wandb"]
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    """`auto` is online if there is a key, else offline."""
    finish_timeout_seconds: PositiveFloat
    """How long the end of a stage waits for W&B."""
    init_timeout_seconds: PositiveFloat
    """Timeout for the server's first answer; training does not wait for it."""


class NoTracking(Section):
    """metrics.jsonl only."""

    kind: Literal["none"]

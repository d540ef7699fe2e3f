"""The stages that train nothing: evaluation and merge; types and ranges; no torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.alignment import RewardSource, RolloutConfig
from orchestrator.config.base import NaturalFloat, PositiveFloat, PositiveInt, Section
from orchestrator.config.data import DataConfig


class EvaluateStage(Section):
    """Scores an artifact beside its base: loss of the answers, and rewards of what it generates."""

    kind: Literal["evaluate"]
    start_from: str | None
    """Stage whose artifact is scored; `auto` is the nearest earlier one that makes a policy."""
    data: DataConfig
    """`data.train` is what is scored."""
    rows: PositiveInt
    """Rows that are scored, at most."""
    micro_size: PositiveInt
    """Rows of one forward pass."""
    rollout: RolloutConfig
    """How answers are generated; `group_size` of them for each prompt."""
    rewards: tuple[RewardSource, ...]
    """What is asked of the answers; none generates nothing."""


class MergeStage(Section):
    """Merges an adapter into its base, measures what that changed, and writes a folder that can be published."""

    kind: Literal["merge"]
    start_from: str | None
    """Stage whose artifact is merged; `auto` is the nearest earlier one that makes a policy."""
    data: DataConfig
    """`data.train` holds the rows on which merged and trained model are compared."""
    rows: PositiveInt
    """Rows that are compared, at most."""
    micro_size: PositiveInt
    """Rows of one forward pass."""
    max_kl: PositiveFloat
    """Largest mean KL divergence, in nats a token, of the merged to the trained model."""
    price_per_hour: NaturalFloat | None
    """Money for an hour of one device, for the model card; null leaves it out."""

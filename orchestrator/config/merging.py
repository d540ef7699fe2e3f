"""Stages that make a model of several: interpolation, soups, merged adapters. Must not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, PositiveFloat, PositiveInt, Section, Text
from orchestrator.config.data import DataConfig
from orchestrator.config.evaluation import ScoringStage


class ChoosingStage(ScoringStage):
    """What every stage has that chooses among models by their scores."""

    choose_by: Literal["accuracy", "loss"]
    """What is compared: accuracy (more is better) or loss (less is better), as means over sets."""
    choose_on: tuple[str, ...]
    """Names of the sets that the choice looks at; keep test sets out of it, and they stay a test."""


class InterpolateStage(ChoosingStage):
    """Weights between two models, theta(a) = (1-a) theta_0 + a theta_1 (WiSE-FT, 2109.01903), scored over a; one is kept."""

    kind: Literal["interpolate"]
    origin: str | None
    """Stage whose artifact is theta_0; null is the base. theta_1 is the artifact of `start_from`."""
    alphas: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    """The values of a that are scored."""
    choose: Literal["best_ood", "best_id", "id_within"]
    """Which a is kept: best on sets with shift, best on those without, or the best on shift among those that lose at most
    `within` against the best without."""
    within: NaturalFloat
    """What `id_within` may lose: a share of the rows where `choose_by` is accuracy (0.01 is one point), else nats a token."""


class SoupStage(ChoosingStage):
    """An average of several fine-tuned models of one base (model soups, 2203.05482)."""

    kind: Literal["soup"]
    members: tuple[Text, ...]
    """Ingredients beside the artifact of `start_from`: `stage:NAME`, or the folder of a finished run, with `:STAGE` behind it
    where it is not the last one that makes a policy."""
    recipe: Literal["uniform", "greedy"]
    """Average all, or (recipe 1 of the paper) from the best one on take in what does not make the average worse."""


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

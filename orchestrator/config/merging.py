"""Stages that make a model of several: interpolation, soups, merged adapters. Must not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, PositiveFloat, PositiveInt, Section, Text
from orchestrator.config.data import DataConfig
from orchestrator.config.evaluation import ScoringStage


class SelectionStage(ScoringStage):
    """What every stage has that chooses among models by their scores."""

    choose_by: Literal["accuracy", "loss"]
    """What is compared: accuracy (more is better) or loss (less is better), as means over sets."""
    choose_on: tuple[str, ...]
    """Names of the sets that the choice looks at; keep test sets out of it, and they stay a test."""


class InterpolateStage(SelectionStage):
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
    """What `id_within` may lose: a share of the rows where `choose_by` is accuracy (0.01 is one point), else nats per token."""


class SoupStage(SelectionStage):
    """An average of several fine-tuned models of one base (model soups, 2203.05482)."""

    kind: Literal["soup"]
    members: tuple[Text, ...]
    """Ingredients besides the artifact of `start_from`: `stage:NAME`, or the folder of a finished run, followed by
    `:STAGE` unless it is the last one that yields a policy."""
    recipe: Literal["uniform", "greedy"]
    """`uniform` averages all; `greedy` (recipe 1 of the paper) starts from the best and adds what does not worsen the
    average."""


class MergeStage(Section):
    """Merges an adapter into its base, measures the change, and writes a folder ready to publish."""

    kind: Literal["merge"]
    start_from: str | None
    """Stage whose artifact is merged; `auto` is the nearest earlier one that yields a policy."""
    data: DataConfig
    """`data.train` holds the rows on which the merged and the trained model are compared."""
    rows: PositiveInt
    """Upper limit of the rows compared."""
    micro_size: PositiveInt
    """Rows of one forward pass."""
    max_kl: PositiveFloat
    """Largest mean KL divergence, in nats per token, from the trained to the merged model."""
    price_per_hour: NaturalFloat | None
    """Price per device-hour, for the model card; null omits it."""

"""Stages that make a model of several: interpolation, soups, merged adapters. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, PositiveFloat, PositiveInt, Text
from orchestrator.config.data import DataConfig
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.rollout import STAGE_PREFIX
from orchestrator.config.stage import Product, StageSettings
from orchestrator.config.tuning import Tuning


class SelectionStage(ScoringStage):
    """What every stage has that chooses among models by their scores."""

    choose_by: Literal["accuracy", "loss"]
    """What is compared: accuracy (more is better) or loss (less is better), as means over sets."""
    choose_on: tuple[str, ...]
    """Names of the sets that the choice looks at; keep test sets out of it, and they stay a test."""
    makes: ClassVar[Product | None] = "policy"

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        yield from super().problems(name, ranks=ranks)
        field, shifts = f"stages.{name}.choose_on", self.shifts
        unknown = [one for one in self.choose_on if one not in shifts]
        if unknown:
            yield f"{field}: {', '.join(unknown)}: no such set; there are {', '.join(shifts)}"
        kinds = {shifts[one] for one in self.choose_on if one in shifts}
        there = ", ".join(f"{one} ({'shift' if is_shift else 'no shift'})" for one, is_shift in shifts.items())
        yield from (f"{field}: {problem}" for problem in self._choice_problems(kinds, there))

    def _choice_problems(self, kinds: set[bool], there: str) -> Iterator[str]:
        """What the choice lacks: `kinds` says whether sets with and without shift are named, `there` which ones exist."""
        del kinds, there
        yield from ()

    def tuning_problems(self, name: str, tuning: Tuning) -> Iterator[str]:
        if tuning.uses_dora:
            yield (
                f"stages.{name}: with tuning.use_dora=true the weights are not the sum of base and product, so a blend of adapters is "
                "not a blend of models; set tuning.use_dora=false, or tune whole models"
            )


class InterpolateStage(SelectionStage):
    """Weights between two models, theta(a) = (1-a) theta_0 + a theta_1 (WiSE-FT, 2109.01903), scored over a; one is kept."""

    kind: Literal["interpolate"]
    follows_start: ClassVar[bool] = True
    starts_from: ClassVar[tuple[Product, ...]] = ("policy", "classifier")
    needs_start: ClassVar[bool] = True
    blend_key: ClassVar[str] = "origin"
    origin: str | None
    """Stage whose artifact is theta_0; null is the base. theta_1 is the artifact of `start_from`."""
    alphas: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    """The values of a that are scored."""
    choose: Literal["best_ood", "best_id", "id_within"]
    """Which a is kept: best on sets with shift, best on those without, or the best on shift among those that lose at most
    `within` against the best without."""
    within: NaturalFloat
    """What `id_within` may lose: a share of the rows where `choose_by` is accuracy (0.01 is one point), else nats per token."""

    @property
    def blended_stages(self) -> tuple[str, ...]:
        return () if self.origin is None else (self.origin,)

    @property
    def adds_up_ranks(self) -> bool:
        return self.origin is not None

    def models_on_host(self, *, is_adapter: bool) -> int:
        del is_adapter
        return 2

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        yield from super().problems(name, ranks=ranks)
        if self.origin is not None and self.origin == self.start_from:
            yield (
                f"stages.{name}.origin: {self.origin} is also what it starts from, and between a model and itself there is nothing to "
                "choose; name an earlier stage, or null for the base"
            )

    def _choice_problems(self, kinds: set[bool], there: str) -> Iterator[str]:
        needs = {"best_ood": {True}, "best_id": {False}, "id_within": {True, False}}[self.choose]
        for is_shift in sorted(needs - kinds):
            what = "with shift=true" if is_shift else "without shift"
            yield f"choose={self.choose} needs a set {what}; name one (there are {there}), and no test set"


class SoupStage(SelectionStage):
    """An average of several fine-tuned models of one base (model soups, 2203.05482)."""

    kind: Literal["soup"]
    blend_key: ClassVar[str] = "members"
    members: tuple[Text, ...]
    """Ingredients besides the artifact of `start_from`: `stage:NAME`, or the folder of a finished run, followed by
    `:STAGE` unless it is the last one that yields a policy."""
    recipe: Literal["uniform", "greedy"]
    """`uniform` averages all; `greedy` (recipe 1 of the paper) starts from the best and adds what does not worsen the
    average."""

    @property
    def blended_stages(self) -> tuple[str, ...]:
        return tuple(member.removeprefix(STAGE_PREFIX) for member in self.members if member.startswith(STAGE_PREFIX))

    @property
    def external_members(self) -> tuple[str, ...]:
        return tuple(member for member in self.members if not member.startswith(STAGE_PREFIX))

    @property
    def adds_up_ranks(self) -> bool:
        return True

    def models_on_host(self, *, is_adapter: bool) -> int:
        """The ingredients; of whole models one more, their average."""
        ingredients = len(self.members) + (self.start_from is not None)
        return ingredients if is_adapter else ingredients + 1

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        yield from super().problems(name, ranks=ranks)
        first = () if self.start_from is None else (STAGE_PREFIX + self.start_from,)
        ingredients = (*first, *self.members)
        if len(set(ingredients)) < max(2, len(ingredients)):
            yield (
                f"stages.{name}.members: a soup needs two or more different ingredients, these are {', '.join(ingredients) or 'none'}; "
                "type stage:NAME or the folder of a finished run"
            )

    def _choice_problems(self, kinds: set[bool], there: str) -> Iterator[str]:
        if self.recipe == "greedy" and not kinds:
            yield f"recipe=greedy uses held-out scores; name the sets for it, none of them a test set (there are {there})"


class MergeStage(StageSettings):
    """Merges an adapter into its base, measures the change, and writes a folder ready to publish."""

    kind: Literal["merge"]
    makes: ClassVar[Product | None] = "merged model"
    needs_start: ClassVar[bool] = True
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

    def tuning_problems(self, name: str, tuning: Tuning) -> Iterator[str]:
        if not tuning.is_adapter:
            yield f"stages.{name}: tuning={tuning.method} leaves no adapter to merge; remove {name} from the pipeline"

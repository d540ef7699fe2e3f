"""What a stage says of its kind: a kind overrides what differs, and other code asks the stage. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, TypeAlias

from orchestrator.config.base import Section
from orchestrator.config.data import DataConfig
from orchestrator.config.functions import FunctionSource
from orchestrator.config.rollout import RewardSource, RolloutConfig
from orchestrator.config.tuning import Tuning

Product: TypeAlias = Literal["policy", "classifier", "reward model", "merged model"]
RowKind: TypeAlias = Literal["text", "pair", "feedback", "class", "prompt"]
"""What a row is to the loss; the formats of each are in `orchestrator/data/formats/columns.py`."""


class StageSettings(Section):
    """Base of every stage, with the answers of a stage that trains nothing and scores nothing."""

    makes: ClassVar[Product | None] = None
    """What its artifact is; None leaves none."""
    follows_start: ClassVar[bool] = False
    """Whether its artifact is a classifier if the one that it starts from is."""
    starts_from: ClassVar[tuple[Product, ...]] = ("policy",)
    """What the stage that `start_from` names may make."""
    auto_starts_from: ClassVar[tuple[Product, ...] | None] = None
    """What `start_from: auto` looks for, if that is not all of `starts_from`."""
    needs_start: ClassVar[bool] = False
    """Whether it cannot start from the base alone."""
    trains: ClassVar[bool] = False
    """Whether it has an optimizer; every stage runs on all ranks."""
    row_kind: ClassVar[RowKind | None] = None
    """The rows that it trains on; None if it trains nothing and takes several kinds."""
    has_new_head: ClassVar[bool] = False
    """Whether it trains a new head in place of the vocabulary's."""
    blend_key: ClassVar[str] = ""
    """The key that names further models of a blend."""

    @property
    def rows_wanted(self) -> RowKind | None:
        """`row_kind`, unless a setting decides."""
        return self.row_kind

    @property
    def reads_prompts(self) -> bool:
        """Whether its rows are prompts, whose completions it generates and trains on."""
        return self.row_kind == "prompt"

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """What scores the completions that it generates."""
        return ()

    @property
    def generation(self) -> RolloutConfig | None:
        """How completions are generated, if any are."""
        return None

    @property
    def further_data(self) -> Mapping[str, DataConfig]:
        """Sets of rows besides `data`, by their key within the stage."""
        return {}

    @property
    def further_sets(self) -> tuple[str, ...]:
        """Names of the sets of `further_data`, in the same order."""
        return ()

    @property
    def blended_stages(self) -> tuple[str, ...]:
        """Stages of the same run whose artifacts are blended with that of `start_from`."""
        return ()

    @property
    def external_members(self) -> tuple[str, ...]:
        """Models of a blend that come from other runs."""
        return ()

    @property
    def adds_up_ranks(self) -> bool:
        """Whether the low-rank products of several adapters are summed, so that the result's rank is the sum of theirs."""
        return False

    @property
    def user_functions(self) -> Mapping[str, tuple[FunctionSource, ...]]:
        """A user's own functions by their key within the stage."""
        return {}

    @property
    def requires_proven_rewards(self) -> bool:
        """Whether a reward model must have been shown to beat chance."""
        return False

    @property
    def predicts_numbers(self) -> bool:
        """Whether the head is a regression's."""
        return False

    def models_on_host(self, *, is_adapter: bool) -> int:
        """Adapters, or else whole models, that are held in host memory to be blended."""
        del is_adapter
        return 0

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        """A sentence for every broken rule across the stage's own keys; `name` is the stage's in the pipeline."""
        del name, ranks
        yield from ()

    def tuning_problems(self, name: str, tuning: Tuning) -> Iterator[str]:
        """A sentence for every reason why it cannot work on models of a tuning."""
        del name, tuning
        yield from ()

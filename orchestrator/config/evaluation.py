"""Types and ranges of the stages that train nothing but score, average or merge models. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field, model_validator

from orchestrator.config.base import Identifier, PositiveInt, Section, Text
from orchestrator.config.data import DataConfig, DataFormat, SourceConfig
from orchestrator.config.rollout import RewardSource, RolloutConfig
from orchestrator.config.stage import Product, StageSettings

FIRST_SET = "data"
"""Name of the set that `data.train` forms, next to those in `sets`."""
FORGETTING = "forgetting"
"""Name of the general text among the sets."""
INHERITED = ("format", "split", "subset", "revision", "columns")
"""Keys that a set takes from `data.train` unless it sets them."""
Options = Literal["auto", "none"] | Annotated[tuple[Text, ...], Field(min_length=2)]
"""The answer options: `auto` collects them from the set's own answers if they are few, `none` measures no accuracy, or
a list."""


class ScoredSet(Section):
    """One more set to score on; missing keys are taken from `data.train` and the stage."""

    path: Text
    """File, glob, folder or hub id."""
    format: DataFormat
    split: str | None
    """Split of a hub data set or of a folder."""
    subset: str | None
    """Subset (configuration) of a hub data set."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    columns: dict[str, str]
    """The format's field -> the file's column."""
    shift: bool
    """Out of distribution: data unlike what was trained on."""
    options: Options
    """The answer options."""


class ScoringStage(StageSettings):
    """Common settings of stages that score models on named sets."""

    start_from: str | None
    """Stage whose artifact is scored; `auto` is the nearest earlier one that yields a policy or (evaluate, interpolate)
    a classifier."""
    data: DataConfig
    """`data.train` is the first set to be scored, named `data`; the other settings apply to every set."""
    rows: PositiveInt
    """Upper limit of the rows scored per set: its first ones."""
    micro_size: PositiveInt
    """Rows per forward pass."""
    shift: bool
    """Whether `data.train` is out of distribution."""
    options: Options
    """The answer options of `data.train`: `auto`, `none` or a list."""
    sets: dict[Identifier, ScoredSet]
    """Further sets by name."""
    exact_match: bool
    """Also generate one greedy answer per row and compare it with the row's own."""
    forgetting: bool
    """Also score a fixed general text that is in no training set."""
    rollout: RolloutConfig
    """How answers are generated."""

    @property
    def generation(self) -> RolloutConfig | None:
        return self.rollout if self.exact_match or self.reward_sources else None

    @property
    def further_data(self) -> Mapping[str, DataConfig]:
        return {f"sets.{name}": self._data_of_set(name) for name in self.sets}

    @property
    def further_sets(self) -> tuple[str, ...]:
        return tuple(self.sets)

    @property
    def shifts(self) -> dict[str, bool]:
        """Whether each set is out of distribution, by name, `data` first."""
        return {FIRST_SET: self.shift} | {name: entry.shift for name, entry in self.sets.items()}

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        field = f"stages.{name}"
        for key in self.sets:
            if key in (FIRST_SET, FORGETTING):
                yield f"{field}.sets.{key}: this name is taken (data is data.train); give the set another one"
        if self.data.packing != "none":
            yield f"{field}.data.packing: rows are scored one by one; set packing=none, not {self.data.packing}"

    def classifier_problems(self, name: str) -> Iterator[str]:
        """A sentence for every setting that a classifier, which `start_from` names, cannot fulfil."""
        asked = ["exact_match"] if self.exact_match else []
        asked += ["rewards"] if self.reward_sources else []
        for key in asked:
            yield f"stages.{name}.{key}: {self.start_from} is a classifier, which generates no answer; remove it"
        given = {"options": self.options} | {f"sets.{key}.options": entry.options for key, entry in self.sets.items()}
        for key, options in given.items():
            if options != "auto":
                yield f"stages.{name}.{key}: {self.start_from} is a classifier, whose options are its classes; type auto"

    def _data_of_set(self, name: str) -> DataConfig:
        """The data settings of one entry of `sets`: the stage's data with another file."""
        entry = self.sets[name]
        source = SourceConfig(
            path=entry.path,
            format=entry.format,
            split=entry.split,
            subset=entry.subset,
            revision=entry.revision,
            columns=entry.columns,
            rows=None,
            weight=None,
            unlabelled=self.data.train.unlabelled,
            no_label=self.data.train.no_label,
        )
        held_out = self.data.eval.model_copy(update={"path": "none"})
        return self.data.model_copy(update={"train": source, "mix": (), "eval": held_out})

    @model_validator(mode="before")
    @classmethod
    def _sets_inherit(cls, values: object) -> object:
        """Fill the entries of `sets`, which only name what differs from `data.train` and the stage."""
        if not isinstance(values, dict):
            return values
        given = _with_tuples(cast("dict[str, object]", values))
        sets, data = given.get("sets"), given.get("data")
        train = cast("dict[str, object]", data).get("train") if isinstance(data, dict) else None
        if not isinstance(sets, dict) or not isinstance(train, dict):
            return given
        settings = cast("dict[str, object]", train)
        shared = {key: settings[key] for key in INHERITED if key in settings}
        shared |= {key: given[key] for key in ("shift", "options") if key in given}
        entries = cast("dict[str, object]", sets).items()
        given["sets"] = {
            name: {**shared, **_with_tuples(cast("dict[str, object]", entry))} if isinstance(entry, dict) else entry
            for name, entry in entries
        }
        return given


def _with_tuples(values: dict[str, object]) -> dict[str, object]:
    """The values with lists as tuples: after a validator in mode `before`, pydantic refuses lists."""
    return {
        key: tuple(cast("list[object]", value)) if isinstance(value, list) else value for key, value in values.items()
    }


class EvaluateStage(ScoringStage):
    """Scores an artifact and its base on several sets: loss, accuracy and exact match of the answers, rewards,
    forgetting.
    """

    kind: Literal["evaluate"]
    starts_from: ClassVar[tuple[Product, ...]] = ("policy", "classifier")
    needs_start: ClassVar[bool] = True
    rewards: tuple[RewardSource, ...]
    """Checks of the answers generated to `data.train`; none generates nothing for it."""

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        return self.rewards

"""Types and ranges of the stages that train nothing but score, average or merge models. Must not import torch."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field, model_validator

from orchestrator.config.alignment import RewardSource, RolloutConfig
from orchestrator.config.base import Identifier, PositiveInt, Section, Text
from orchestrator.config.data import DataConfig, DataFormat, SourceConfig

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


class ScoringStage(Section):
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
    rewards: tuple[RewardSource, ...]
    """Checks of the answers generated to `data.train`; none generates nothing for it."""


def data_of_set(stage: ScoringStage, name: str) -> DataConfig:
    """The data settings of one entry of `sets`: the stage's data with another file."""
    entry = stage.sets[name]
    source = SourceConfig(
        path=entry.path,
        format=entry.format,
        split=entry.split,
        subset=entry.subset,
        revision=entry.revision,
        columns=entry.columns,
        rows=None,
        weight=None,
        unlabelled=stage.data.train.unlabelled,
        no_label=stage.data.train.no_label,
    )
    held_out = stage.data.eval.model_copy(update={"path": "none"})
    return stage.data.model_copy(update={"train": source, "mix": (), "eval": held_out})


def shifts_of(stage: ScoringStage) -> dict[str, bool]:
    """Whether each set is out of distribution, by name, `data` first."""
    return {FIRST_SET: stage.shift} | {name: entry.shift for name, entry in stage.sets.items()}

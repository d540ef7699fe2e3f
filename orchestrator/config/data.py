"""Types and ranges of data sets and of how their rows become batches. Must not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.config.base import PositiveFloat, PositiveInt, Section, Text

DataFormat = Literal[
    "auto",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "preference",
    "feedback",
    "classification",
    "text",
    "prompts",
]


class LabelReading(Section):
    """What to do with rows without a label in a source of format `classification`; other formats ignore it."""

    unlabelled: Literal["refuse", "drop", "keep"]
    """`refuse` fails and names the rows, `drop` skips and counts them, `keep` is for self-training, which labels
    them."""
    no_label: int | str | None
    """Value that means "no label", such as -1, besides an empty or missing one. Null: no such value."""


class SourceConfig(LabelReading):
    """One data set: files or a hub id."""

    path: Text
    """File, glob, folder, hub id, or a set that ships with this tool: `demonstration`, `demonstration_preferences`."""
    format: DataFormat
    """`auto` detects the format from the first row and reports it."""
    split: str | None
    """Split of a hub data set or of a folder; null takes `train` if there is one, else every file."""
    subset: str | None
    """Subset (configuration) of a hub data set; null is the only one or the default."""
    revision: str | None
    """Branch, tag or commit on the hub; null is the default branch."""
    columns: dict[str, str]
    """The format's field -> the file's column, for files with other column names: {prompt: question, completion:
    answer}."""
    rows: PositiveInt | None
    """Rows that a mixture takes from this source; a smaller source is repeated. Null takes all, or the share in
    `weight`."""
    weight: PositiveFloat | None
    """Relative share of the rows in a mixture; no source is repeated. Null: `rows` decides, or all are taken."""

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> SourceConfig:
        if self.rows is not None and self.weight is not None:
            raise ValueError(f"rows={self.rows} and weight={self.weight} are both given: give one of them")
        return self


class HeldOutConfig(LabelReading):
    """Held-out rows for evaluation."""

    path: Text
    """File, glob, folder, hub id; `auto`: the demonstration's held-out file, else a split of train; `none`: no evaluation."""
    format: DataFormat
    """`auto` detects the format from the first row and reports it."""
    split: str | None
    """Split of a hub data set or of a folder; null takes every file."""
    subset: str | None
    """Subset (configuration) of a hub data set; null is the only one or the default."""
    revision: str | None
    """Branch, tag or commit on the hub; null is the default branch."""
    columns: dict[str, str]
    """The format's field -> the file's column, as in `train`."""
    fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the train rows held out if `path` is `auto`."""
    max_rows: PositiveInt
    """Upper limit of the rows held out by `fraction`."""


class DataConfig(Section):
    """The rows of a stage, from the file to the batch."""

    train: SourceConfig
    """The rows to train on."""
    mix: tuple[SourceConfig, ...]
    """Further sources mixed with `train`; keys missing from an entry are taken from `train`."""
    eval: HeldOutConfig
    """Held-out rows for evaluation."""
    max_length: PositiveInt
    """Longest row in tokens; longer ones are truncated and counted."""
    loss_on: Literal["answers", "last_answer", "all"]
    """Tokens that count in the loss: every answer with its end-of-turn token, only the last answer, or everything."""
    truncation: Literal["refuse", "accept"]
    """What to do if over 1 % of the rows lose trained tokens to `max_length`."""
    overlap: Literal["refuse", "accept"]
    """What to do if rows of `eval` also occur verbatim in `train`."""
    deduplicate: bool
    """Drop rows that repeat an earlier train row verbatim."""
    packing: Literal["none", "best_fit", "split"]
    """`best_fit` joins whole rows to sequences of `max_length`, `split` may also cut rows; documents never attend to
    each other."""
    group_by_length: bool
    """Shuffled batches of rows of similar length; only with `packing` none."""
    tokens_per_batch: PositiveInt | None
    """Micro-batches of rows of similar length, with at most this many tokens including padding; `batch.global_size`
    then counts micro-batches and `batch.micro_size` is 1. Only with `packing` none. Null counts rows."""
    pad_to_multiple_of: PositiveInt
    """A batch is padded to its longest row, rounded up to this many tokens."""
    chat_template: str | None
    """Jinja file that replaces the tokenizer's chat template; null keeps it (or takes the documented default if there
    is none)."""
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """The date (YYYY-MM-DD) given to templates that ask for today's, so that rows do not change from day to day."""
    num_processes: PositiveInt | None
    """Processes that tokenise; null is one per core available to this process."""

    @model_validator(mode="before")
    @classmethod
    def _mix_inherits_from_train(cls, values: object) -> object:
        """Fill the entries of `mix`, which only name what differs from `train`."""
        if not isinstance(values, dict):
            return values
        given: dict[str, object] = dict(values)  # pyright: ignore[reportUnknownArgumentType]
        train, mix = given.get("train"), given.get("mix")
        if not isinstance(train, dict) or not isinstance(mix, (list, tuple)):
            return given
        given["mix"] = tuple({**train, **entry} if isinstance(entry, dict) else entry for entry in mix)  # pyright: ignore
        return given

    @model_validator(mode="after")
    def _grouping_needs_single_rows(self) -> DataConfig:
        if self.group_by_length and self.packing != "none":
            raise ValueError(
                f"group_by_length=true sorts single rows, but packing={self.packing} joins them to rows of one length: "
                "set packing=none or group_by_length=false"
            )
        if self.tokens_per_batch is not None and self.packing != "none":
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} makes batches of single rows, but packing={self.packing} joins them: "
                "set packing=none or tokens_per_batch=null"
            )
        if self.tokens_per_batch is not None and self.tokens_per_batch < self.max_length:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} cannot hold a row of max_length={self.max_length}"
            )
        return self


def held_out_rows(rows: int, settings: HeldOutConfig) -> int:
    """Rows that a split by `fraction` holds out of `rows`: at least one, at most `max_rows`, never all."""
    return min(settings.max_rows, max(1, round(rows * settings.fraction)), max(0, rows - 1))

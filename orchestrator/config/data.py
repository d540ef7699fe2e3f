"""Data sets and what the loss sees of them: types and ranges; no torch."""

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
    """What a source of format classification says where a row has no label; other formats have nothing to do with it."""

    unlabelled: Literal["refuse", "drop", "keep"]
    """`refuse` names the rows, `drop` leaves them out and counts them, `keep` is for self-training, which labels them."""
    no_label: int | str | None
    """The value that stands for no label, such as -1; an empty or missing label always does. Null: nothing else."""


class SourceConfig(LabelReading):
    """One data set: files or a hub id."""

    path: Text
    """File, glob, folder, hub id, or a set that ships with this tool: `demonstration`, `demonstration_preferences`."""
    format: DataFormat
    """`auto` detects the format from the first row and tells it."""
    split: str | None
    """Split of a hub data set or of a folder; null takes `train` where there is one, else every file."""
    subset: str | None
    """Subset (configuration) of a hub data set; null is the only one or the default."""
    revision: str | None
    """Branch, tag or commit on the hub; null is the default branch."""
    columns: dict[str, str]
    """The format's field -> the file's column, for files that name them otherwise: {prompt: question, completion: answer}."""
    rows: PositiveInt | None
    """Take so many rows in a mixture; a smaller source is repeated. Null takes all, or what `weight` says."""
    weight: PositiveFloat | None
    """Relative share of the rows in a mixture, without repeating any source; null where `rows` or nothing is said."""

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> SourceConfig:
        if self.rows is not None and self.weight is not None:
            raise ValueError(f"rows={self.rows} and weight={self.weight} are both given: say one of them")
        return self


class HeldOutConfig(LabelReading):
    """What is evaluated on."""

    path: Text
    """File, glob, folder, hub id; `auto`: the demonstration's held-out file, else a split of train; `none`: no evaluation."""
    format: DataFormat
    """`auto` detects the format from the first row and tells it."""
    split: str | None
    """Split of a hub data set or of a folder; null takes every file."""
    subset: str | None
    """Subset (configuration) of a hub data set; null is the only one or the default."""
    revision: str | None
    """Branch, tag or commit on the hub; null is the default branch."""
    columns: dict[str, str]
    """The format's field -> the file's column, as in `train`."""
    fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the train rows held out where `path` is `auto`."""
    max_rows: PositiveInt
    """At most so many rows are held out by `fraction`."""


class DataConfig(Section):
    """The rows of a stage, from the file to the batch."""

    train: SourceConfig
    """What is trained on."""
    mix: tuple[SourceConfig, ...]
    """Further sources mixed with `train`; keys left out of an entry are taken from `train`."""
    eval: HeldOutConfig
    """What is evaluated on."""
    max_length: PositiveInt
    """Tokens of a row; longer ones are cut and counted."""
    loss_on: Literal["answers", "last_answer", "all"]
    """Tokens that count in the loss: every answer with its turn end, only the last one, or everything."""
    truncation: Literal["refuse", "accept"]
    """What to do where over 1 % of the rows lose trained tokens to `max_length`."""
    overlap: Literal["refuse", "accept"]
    """What to do where rows of `eval` stand in `train` word by word."""
    deduplicate: bool
    """Drop rows that stand earlier in train word by word."""
    packing: Literal["none", "best_fit", "split"]
    """`best_fit` joins whole rows, `split` also cuts them, to sequences of `max_length`; documents never see each other."""
    group_by_length: bool
    """Batches of rows of like length, shuffled; only where `packing` is none."""
    tokens_per_batch: PositiveInt | None
    """Micro-batches of rows of like length, of at most so many tokens with padding; `batch.global_size` then counts such
    batches and `batch.micro_size` is 1. Only where `packing` is none. Null counts rows."""
    pad_to_multiple_of: PositiveInt
    """A batch is padded to its longest row, rounded up to this many tokens."""
    chat_template: str | None
    """Jinja file that replaces the tokenizer's chat template; null keeps it (or the documented default where it has none)."""
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """The date (YYYY-MM-DD) that templates are told when they ask for today's: rows must not change from day to day."""
    num_processes: PositiveInt | None
    """Processes that tokenise; null is one for every core this process may use."""

    @model_validator(mode="before")
    @classmethod
    def _mix_inherits_from_train(cls, values: object) -> object:
        """An entry of `mix` says only what differs from `train`."""
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
    """Rows that a split by `fraction` takes out of `rows`: at least one, at most `max_rows`, and never all."""
    return min(settings.max_rows, max(1, round(rows * settings.fraction)), max(0, rows - 1))

"""Raw held-out rows of a finished stage: those of `eval.path`, or those split off from train. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.config.run import RunConfig
from orchestrator.data.formats.examples import Example
from orchestrator.data.formats.parse import parse_row
from orchestrator.data.sources.locate import held_out_source, locate, splits_train
from orchestrator.data.sources.validate import reading_of, settle_format, source_rows
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import RunFolder


def held_out_examples(config: RunConfig, run: RunFolder, stage: str, count: int) -> Iterator[Example]:
    """The first `count` held-out rows; ConfigError if there are none, or their files are not on this machine."""
    data = config.stages[stage].data
    source = held_out_source(data)
    if source is not None:
        yield from islice(_examples(source, field="data.eval"), count)
    elif splits_train(data):
        yield from _split_off(data, run, stage, count)
    else:
        raise ConfigError(
            f"--examples: {stage} held out no rows (stages.{stage}.data.eval.path=none); use --prompt TEXT"
        )


def _split_off(data: DataConfig, run: RunFolder, stage: str, count: int) -> Iterator[Example]:
    """The rows that preparation held out, found by their numbers in the train files."""
    from orchestrator.data.prepared.folder import PreparedFolder  # maps arrays, which the login side needs only here

    prepared = Path(str(read_json(run.stage(stage).prepared)["evaluation"]))
    if not prepared.is_dir():
        raise ConfigError(
            f"--examples: the prepared rows of {stage} are no longer in {prepared}; type `prepare {run.root}`, or use --prompt TEXT"
        )
    wanted = [int(row) for row in PreparedFolder(prepared).unit_rows[:count]]
    found: dict[int, Example] = {}
    position = 0
    for source in (data.train, *data.mix):
        for example in _examples(source, field="data.train"):
            if position in wanted:
                found[position] = example
            position += 1
    yield from (found[row] for row in wanted if row in found)


def _examples(source: SourceConfig, *, field: str) -> Iterator[Example]:
    files = locate(source, field=field)
    if files is None:
        raise ConfigError(f"--examples: {source.path} is not on this machine; use --prompt TEXT")
    reading = reading_of(source, settle_format(source, files, field=field))
    for _, _, row in source_rows(files):
        yield parse_row(row, reading.format, reading.columns)

"""Looks at what a resolved configuration names: the base model and the data. Reads files; never torch or a network."""

from __future__ import annotations

from orchestrator.bases import Base, find_base
from orchestrator.config.run import RunConfig, Stage
from orchestrator.dataset.sources import held_out_source, inspect, splits_train, validate_rows
from orchestrator.dataset.splits import held_out_rows
from orchestrator.errors import OrchestratorError
from orchestrator.plan import DataFacts


def gather(config: RunConfig) -> tuple[Base, dict[str, DataFacts]]:
    """Facts of the base and of every stage's data; one error with all problems."""
    problems: list[OrchestratorError] = []
    base: Base | None = None
    facts: dict[str, DataFacts] = {}
    try:
        base = find_base(config.model)
    except OrchestratorError as error:
        problems.append(error)
    for name in config.pipeline:
        try:
            facts[name] = _data_facts(name, config.stages[name])
        except OrchestratorError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])([sentence for error in problems for sentence in error.problems])
    assert base is not None
    return base, facts


def validate_data(config: RunConfig) -> None:
    """Reads every local row of every stage; DataError names file, line and field of each bad one."""
    for name in config.pipeline:
        data = config.stages[name].data
        field = f"stages.{name}.data"
        sources = {f"{field}.train": data.train}
        sources |= {f"{field}.mix.{number}": source for number, source in enumerate(data.mix)}
        held_out = held_out_source(data)
        if held_out is not None:
            sources[f"{field}.eval"] = held_out
        for key, source in sources.items():
            if inspect(source, field=key).rows is not None:
                validate_rows(source, field=key)


def _data_facts(name: str, stage: Stage) -> DataFacts:
    field = f"stages.{name}.data"
    train = inspect(stage.data.train, field=f"{field}.train")
    held_out = held_out_source(stage.data)
    rows = train.rows
    evaluation: int | None = 0
    if held_out is not None:
        evaluation = inspect(held_out, field=f"{field}.eval").rows
    elif splits_train(stage.data) and rows is not None:
        evaluation = held_out_rows(rows, stage.data.eval)
        rows -= evaluation
    if stage.data.mix or stage.data.deduplicate:
        rows = None  # prepare counts them
    return DataFacts(train_rows=rows, evaluation_rows=evaluation, format=train.format, bytes=train.bytes)

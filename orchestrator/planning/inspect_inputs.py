"""Inspects the base model and the data of a resolved configuration. Reads files only; never uses torch or a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from orchestrator.architecture.adapter_parameters import adapter_problems, shape_problems
from orchestrator.architecture.base_model import Base, find_base, local_folder
from orchestrator.architecture.kernels import head_problems, liger_is_installed
from orchestrator.architecture.read import ENCODERS
from orchestrator.config.data import DataConfig, SourceConfig, held_out_rows
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, Stage, data_sets_of, makes_classifier, training_stages
from orchestrator.config.training import TrainingStage
from orchestrator.data.formats.columns import mapping_override, past_template
from orchestrator.data.formats.trainable import format_problem
from orchestrator.data.prepared.key import has_template
from orchestrator.data.prepared.parts import find_prepared
from orchestrator.data.prepared.statistics import PreparedFacts, prepared_facts
from orchestrator.data.sources.locate import held_out_source, splits_train
from orchestrator.data.sources.validate import SourceFacts, inspect, validate_rows
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.files.cache import cache_folder
from orchestrator.metrics.phases import READING
from orchestrator.metrics.screen import busy
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.measured_speed import find_measured
from orchestrator.run_state.soup_members import blend_problems

Result = TypeVar("Result")


def inspect_inputs(config: RunConfig) -> tuple[Base, dict[str, DataFacts]]:
    """Facts about the base and every stage's data; one error with all problems."""
    problems: list[str] = []
    base = _attempt(partial(find_base, config.model), problems)
    sources = {name: sources_of(name, stage) for name, stage in config.stages.items() if name in config.pipeline}
    if base is not None and base.architecture is not None:
        tunings = [config.for_stage(name).tuning for name in sources]
        problems += dict.fromkeys(
            chain.from_iterable(
                adapter_problems(base.architecture, tuning) + shape_problems(base.architecture, tuning)
                for tuning in tunings
            )
        )
        problems += _encoder_problems(base.architecture, config)
    looks = {
        key: _attempt(partial(inspect, source, field=key, wanted=config.stages[name].rows_wanted), problems)
        for name, named in sources.items()
        for key, source in named.items()
    }
    problems += _format_problems(config, sources, looks)
    problems += [
        f"stages.{name}.data.chat_template: {stage.data.chat_template} is not a file; give a Jinja file, or null for the tokenizer's own"
        for name, stage in config.stages.items()
        if name in config.pipeline and stage.data.chat_template and not Path(stage.data.chat_template).is_file()
    ]
    problems += blend_problems(config)
    problems += head_problems(config, has_liger=liger_is_installed())
    if problems:
        raise DataError(problems)
    assert base is not None
    found = {key: look for key, look in looks.items() if look is not None}
    facts = {
        name: replace(
            _data_facts(name, config.stages[name], found),
            templated=_templated(config, name, found[f"stages.{name}.data.train"]),
        )
        for name in sources
    }
    return base, {name: _with_preparation(config, name, base, data) for name, data in facts.items()}


def _format_problems(
    config: RunConfig, sources: Mapping[str, Mapping[str, SourceConfig]], looks: Mapping[str, SourceFacts | None]
) -> list[str]:
    """Sources without a trained token for their stage, among those that can be inspected."""
    found = [
        format_problem(config.stages[name], look.format, look.first, field=key)
        for name, named in sources.items()
        for key in named
        if (look := looks[key]) is not None
    ]
    return [problem for problem in found if problem is not None]


def _templated(config: RunConfig, name: str, look: SourceFacts) -> str | None:
    """The mapping that renders plain prompts with the base's chat template; None without plain prompts or without a
    template.
    """
    stage = config.stages[name]
    if stage.rows_wanted is None or look.first is None or look.format is None:
        return None
    mapping = past_template(look.first, stage.data.train.columns, look.format)
    if mapping is None or not _has_template(config, stage.data):
        return None
    return mapping_override(f"stages.{name}.data.train", mapping)


def _has_template(config: RunConfig, data: DataConfig) -> bool:
    """Whether there is a chat template: by the tokenizer's files, or by the base's name until these are on this
    machine.
    """
    folder = local_folder(config.model, cache_folder(config.cluster.scratch))
    if folder is not None:
        return has_template(data, folder)
    return data.chat_template is not None or any(
        part in config.model.base.lower() for part in ("instruct", "chat", "-it")
    )


def _encoder_problems(model: Architecture, config: RunConfig) -> list[str]:
    """Problems of an encoder base: it cannot generate, and has no mask that separates packed texts."""
    if model.model_type not in ENCODERS:
        return []
    stages = {name: config.stages[name] for name in config.pipeline}
    problems = [
        f"stages.{name}: {config.model.base} is an encoder, which {stage.kind} cannot train; take stage=classify, or a decoder "
        "such as Llama or Qwen"
        for name, stage in stages.items()
        if not _is_of_classifiers(config, name)
    ]
    return problems + [
        f"stages.{name}.data.packing: {config.model.base} is an encoder, in which packed texts would see each other; type "
        f"stages.{name}.data.packing=none"
        for name, stage in stages.items()
        if stage.makes == "classifier" and stage.data.packing != "none"
    ]


def _is_of_classifiers(config: RunConfig, name: str) -> bool:
    """Whether a stage trains, blends or scores classifiers."""
    stage = config.stages[name]
    scored = name if stage.makes is not None else stage.start_from
    return scored in config.stages and makes_classifier(config, scored)


def _with_preparation(config: RunConfig, name: str, base: Base, data: DataFacts) -> DataFacts:
    """Facts about the rows from the cache, and about the speed from earlier runs."""
    stage, config = training_stages(config).get(name), config.for_stage(name)
    if stage is None:
        return data
    data = replace(data, has_liger=liger_is_installed())
    if base.architecture is not None:
        data = replace(data, measured=find_measured(config, name, base.architecture))
    prepared = _prepared(config, stage)
    if prepared is None:
        return data
    return replace(data, prepared=prepared, train_rows=prepared.units, evaluation_rows=prepared.evaluation_rows)


def _prepared(config: RunConfig, stage: TrainingStage) -> PreparedFacts | None:
    """None if the rows are not prepared yet, or the cache is damaged, which preparing will report."""
    cache, seeds = cache_folder(config.cluster.scratch), config.seeds
    try:
        folder = local_folder(config.model, cache)
        if folder is None:
            return None
        found = find_prepared(stage.data, tokenizer_folder=folder, cache=cache, seed=seeds.split)
        return found and prepared_facts(*found, stage=stage, seed=seeds.data)
    except (DataError, OSError):
        return None


@busy(READING)
def validate_data(config: RunConfig) -> None:
    """Read every local row of every stage; DataError names file, line and field of each bad one."""
    problems: list[str] = []
    for name in config.pipeline:
        for key, source in sources_of(name, config.stages[name]).items():
            if inspect(source, field=key).rows is not None:
                _attempt(partial(validate_rows, source, field=key), problems)
    if problems:
        raise DataError(problems)


def _attempt(look: Callable[[], Result], problems: list[str]) -> Result | None:
    """The result of an inspection; None, with its sentences added to `problems`, if it failed."""
    try:
        return look()
    except OrchestratorError as error:
        problems += error.problems
        return None


def sources_of(name: str, stage: Stage) -> dict[str, SourceConfig]:
    """Every set that a stage reads, by the key that names it."""
    first, *others = data_sets_of(stage).items()
    sources = _sources_of_data(f"stages.{name}.data", first[1])
    return sources | {f"stages.{name}.{key}": data.train for key, data in others}


def _sources_of_data(field: str, data: DataConfig) -> dict[str, SourceConfig]:
    sources = {f"{field}.train": data.train}
    sources |= {f"{field}.mix.{number}": source for number, source in enumerate(data.mix)}
    held_out = held_out_source(data)
    return sources if held_out is None else {**sources, f"{field}.eval": held_out}


def _data_facts(name: str, stage: Stage, looks: Mapping[str, SourceFacts]) -> DataFacts:
    field = f"stages.{name}.data"
    train = looks[f"{field}.train"]
    rows = train.rows
    evaluation: int | None = 0
    if f"{field}.eval" in looks:
        evaluation = looks[f"{field}.eval"].rows
    elif splits_train(stage.data) and rows is not None:
        evaluation = held_out_rows(rows, stage.data.eval)
        rows -= evaluation
    if stage.data.mix or stage.data.deduplicate:
        rows = None  # prepare counts them
    return DataFacts(train_rows=rows, evaluation_rows=evaluation, format=train.format, bytes=train.bytes)

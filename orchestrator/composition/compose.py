"""Composes the configuration once, on the login side; reports every fault with its file and line.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from orchestrator.composition.experiment_file import Sources, open_sources
from orchestrator.composition.hydra_tree import as_sentences, chosen_files, compose_tree, file_of
from orchestrator.composition.mistaken_arguments import bare_argument_problem
from orchestrator.composition.overrides import (
    CONF,
    Override,
    choices_of,
    chooses_group,
    dotted_keys,
    experiment_problems,
    group_problems,
    key_problems,
    parse_override,
)
from orchestrator.composition.recipes import Origins, fit, take_recipes
from orchestrator.composition.yaml_locations import find_key_locations
from orchestrator.config.autos import AUTO, NUMBER_TYPE, SMALLEST, STAGE
from orchestrator.config.pipeline_rules import pipeline_problems
from orchestrator.config.rules import parse_types, rule_problems
from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.machine.dtype import NumberType, dtype_problem, settle
from orchestrator.machine.this_machine import this_machine


@dataclass(frozen=True, kw_only=True)
class Composed:
    """The configuration composed from the valid overrides."""

    config: RunConfig
    problems: list[str]
    """Every problem of overrides, keys and rules."""
    autos: tuple[str, ...]
    """Keys whose value the plan is to choose; the configuration holds the smallest value until then."""
    notes: tuple[str, ...]
    """Every preset value that was changed to fit a typed value or the number of ranks."""
    number_type: NumberType
    """How `model.dtype` was resolved."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The values of files and overrides, before validation."""

    tree: DictConfig
    choices: list[str]
    """Overrides that choose files, including the experiment file."""
    values: list[Override]
    """Overrides that set a value."""
    problems: list[str]


def compose(overrides: Sequence[str], *, config_directory: Path | None = None) -> RunConfig:
    """The validated configuration; raises ConfigError with every problem of overrides, keys, types and rules."""
    composed = examine(overrides, config_directory=config_directory)
    unsettled = [f"{key}: only a plan resolves auto; give a value" for key in composed.autos]
    if composed.problems or unsettled:
        raise ConfigError([*composed.problems, *unsettled])
    return composed.config


def examine(overrides: Sequence[str], *, config_directory: Path | None = None) -> Composed:
    """The configuration composed from the valid overrides, with every problem.

    Raises ConfigError with all problems if keys or types allow no configuration.
    """
    with open_sources(overrides, roots_of(config_directory)) as (rest, sources):
        found = build_tree(rest, sources)
        problems = found.problems
        with as_sentences(sources.roots):
            origins = origins_of(found, sources)
            moved = take_recipes(found.tree, origins)
            autos = take_autos(found.tree)
            unusable, is_auto = _take_dtype(found.tree)
            plain: Any = OmegaConf.to_container(found.tree, resolve=True, throw_on_missing=True)
        wrong = [] if unusable is None else [unusable]
        try:
            config = parse_types(plain)
        except ConfigError as error:
            locations = _locations(found.choices, found.values, sources)
            locations |= {key: locations[own] for key, own in moved.items() if own in locations}
            sentences = [_with_location(problem, locations) for problem in [*wrong, *error.problems]]
            raise ConfigError([*problems, *sentences]) from None
        # while an experiment file is open, because it looks up where values come from
        config, notes = fit(config, origins)
        if wrong:
            problems.append(_with_location(wrong[0], _locations(found.choices, found.values, sources)))
    number_type = settle(config, this_machine(config.cluster.environment), is_auto=is_auto)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": number_type.name})})
    problems += rule_problems(config) + pipeline_problems(config)
    return Composed(config=config, problems=problems, autos=autos, notes=notes, number_type=number_type)


def build_tree(overrides: Sequence[str], sources: Sources) -> Tree:
    """The tree of the valid files and values; ConfigError if there is none."""
    roots = sources.roots
    parsed, problems = _parse(overrides, roots)
    groups = [override for override in parsed if chooses_group(override, roots)]
    values = [override for override in parsed if override not in groups]
    faulty = {override.text: problem for override in groups for problem in group_problems(override, roots)}
    problems += [*faulty.values(), *experiment_problems(groups)]
    missing = [*faulty, *_unread(overrides, parsed)]
    has_experiment = sources.file is not None or any(override.key == "experiment" for override in groups)
    if experiment_problems(groups) or any(_may_be_experiment(text, has_experiment) for text in missing):
        raise ConfigError(problems)  # without its experiment every other override would look wrong
    choices = sources.choices + [override.text for override in groups if override.text not in faulty]
    try:
        with as_sentences(roots):
            tree = compose_tree(choices, roots)
            name = sources.default_name()
            if name is not None:
                tree["name"] = name
            known = dotted_keys(OmegaConf.to_container(tree))
            if not tree.stages and not has_experiment:
                _refuse_stages(values, roots, problems)
            unknown = {override.text: problem for override in values for problem in key_problems(override, known)}
            problems += unknown.values()
            accepted = [override for override in values if override.text not in unknown]
            for override in accepted:
                _set(tree, override)
    except ConfigError as error:
        raise ConfigError([sources.as_given(problem) for problem in error.problems]) from None
    return Tree(tree=tree, choices=choices, values=accepted, problems=problems)


def _refuse_stages(values: Sequence[Override], roots: Sequence[Path], problems: Sequence[str]) -> None:
    """Stage keys without an experiment that defines stages: one sentence for all, since each key by itself is valid."""
    keys = [override.key for override in values if override.key.startswith("stages.") and not override.adds]
    if keys:
        choices = ", ".join(choices_of("experiment", roots))
        sentence = f"{', '.join(keys)}: no experiment was chosen, so there are no stages; add +experiment= with one of {choices}"
        raise ConfigError([*problems, sentence])


def _may_be_experiment(text: str, has_experiment: bool) -> bool:
    """Whether an invalid argument was meant to choose the experiment."""
    return text.lstrip("+").startswith("experiment=") or ("=" not in text and not has_experiment)


def _unread(overrides: Sequence[str], parsed: Sequence[Override]) -> list[str]:
    read = {override.text for override in parsed}
    return [text for text in overrides if text not in read]


def take_autos(tree: DictConfig) -> tuple[str, ...]:
    """Replace every `auto` that the plan can settle by the smallest value; return their keys."""
    stages: Any = OmegaConf.select(tree, "stages", default={})
    smallest = {
        key.replace(STAGE, name): value
        for key, value in SMALLEST.items()
        for name in (stages if STAGE in key else [""])
    }
    autos = [key for key in smallest if OmegaConf.select(tree, key, default=None) == AUTO]
    for key in autos:
        OmegaConf.update(tree, key, smallest[key], force_add=True)
    return tuple(key.removesuffix(".strategy") for key in autos)


def _take_dtype(tree: DictConfig) -> tuple[str | None, bool]:
    """Replace an `auto` or an invalid value by a valid type; return (its problem, whether it was `auto`)."""
    value: object = OmegaConf.select(tree, NUMBER_TYPE, default=None)
    if value is None:
        return None, False  # the types report a missing key
    problem = dtype_problem(value)
    if problem is not None or value == AUTO:
        OmegaConf.update(tree, NUMBER_TYPE, "float32", force_add=True)
    return problem, value == AUTO


def presets(group: str, config_directory: Path | None = None) -> dict[str, Any]:
    """The plain content of every file of a group, by name."""
    roots = roots_of(config_directory)
    files = {name: file_of(f"{group}/{name}", roots) for name in choices_of(group, roots)}
    return {name: OmegaConf.to_container(OmegaConf.load(file)) for name, file in files.items() if file is not None}


def experiments(config_directory: Path | None = None) -> list[str]:
    """Valid names for `+experiment=`."""
    return choices_of("experiment", roots_of(config_directory))


def roots_of(config_directory: Path | None) -> list[Path]:
    """Folders with config groups; a file in an earlier one shadows a file of the same name in a later one."""
    if config_directory is None:
        return [CONF]
    if not config_directory.is_dir():
        raise ConfigError(f"--config-dir: {config_directory} is not a folder")
    return [config_directory.resolve(), CONF]


def _parse(overrides: Sequence[str], roots: Sequence[Path]) -> tuple[list[Override], list[str]]:
    parsed: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        problem = bare_argument_problem(text, roots)
        if problem is not None:
            problems.append(problem)
            continue
        try:
            parsed.append(parse_override(text))
        except ConfigError as error:
            problems += error.problems
    return parsed, problems


def _set(tree: DictConfig, override: Override) -> None:
    """Sets or deletes one key, as Hydra would; a missing key is added, since validation covers all keys."""
    if not override.deletes:
        OmegaConf.update(tree, override.key, override.value, force_add=True)
        return
    parent, _, name = override.key.rpartition(".")
    node: Any = OmegaConf.select(tree, parent) if parent else tree
    with open_dict(tree):
        del node[name]


def _locations(choices: Sequence[str], values: Sequence[Override], sources: Sources) -> dict[str, str]:
    """FILE:LINE of every key that a file gave its value; keys that the command line set are left out."""
    files = chosen_files(choices, sources.roots)
    locations = {key: sources.as_given(location) for key, location in find_key_locations(files).items()}
    for file in [file for file, package in files if package == "experiment"]:
        locations["experiment"] = f"{file}:1"
    typed = {override.key for override in values}
    return {key: location for key, location in locations.items() if not any(related(key, other) for other in typed)}


def origins_of(found: Tree, sources: Sources) -> Origins:
    """Sources of the values. Files are searched only if one of the user's takes part, because it costs a second
    composition.
    """
    find = None if len(sources.roots) == 1 else cache(lambda: _locations(found.choices, (), sources))
    return Origins(typed=tuple(override.key for override in found.values), find_locations=find)


def related(key: str, other: str) -> bool:
    """Whether one of two dotted keys equals the other or is an ancestor of it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _with_location(problem: str, locations: dict[str, str]) -> str:
    key = problem.partition(": ")[0]
    if key == "experiment" and key in locations:
        return f"{locations[key]} must say `# @package _global_`, so that the file's keys are at the root"
    return f"{locations[key]} {problem}" if key in locations else problem

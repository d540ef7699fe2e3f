"""Hydra composes the configuration once, on the login side; every fault is told with its place. Must not import torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orchestrator.config.rules import parse_types, rule_problems
from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.machine import this_machine
from orchestrator.number_type import AUTO, NumberType, dtype_problem, settle
from orchestrator.number_type import KEY as NUMBER_TYPE
from orchestrator.pipeline import pipeline_problems
from orchestrator.recipes import Origins, fit, take_recipes
from orchestrator.words import (
    CONF,
    Override,
    choices_of,
    chooses_group,
    dotted_keys,
    experiment_problems,
    group_problems,
    key_problems,
    parse_word,
)

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl


@dataclass(frozen=True, kw_only=True)
class Composed:
    """The configuration of the words that can be obeyed."""

    config: RunConfig
    problems: list[str]
    """Every problem of words, keys and rules."""
    autos: tuple[str, ...]
    """Keys whose value is to be chosen by the plan; the configuration holds the smallest one in their place."""
    notes: tuple[str, ...]
    """Every value of a preset that gave way to what was typed, or to the number of ranks."""
    number_type: NumberType
    """How `model.dtype` was resolved."""


def compose(overrides: Sequence[str], *, config_directory: Path | None = None) -> RunConfig:
    """The validated configuration; raises ConfigError with every problem of words, keys, types and rules."""
    composed = examine(overrides, config_directory=config_directory)
    unsettled = [f"{key}: auto is settled by a plan alone; give a value" for key in composed.autos]
    if composed.problems or unsettled:
        raise ConfigError([*composed.problems, *unsettled])
    return composed.config


def examine(overrides: Sequence[str], *, config_directory: Path | None = None) -> Composed:
    """The configuration of the words that can be obeyed, with every problem.

    Raises ConfigError, with these and all others, where keys or types allow no configuration.
    """
    roots = _roots(config_directory)
    words, problems = _parse(overrides, choices_of("experiment", roots))
    groups = [word for word in words if chooses_group(word, roots)]
    values = [word for word in words if word not in groups]
    faulty = {word.text: problem for word in groups for problem in group_problems(word, roots)}
    problems += [*faulty.values(), *experiment_problems(groups)]
    if experiment_problems(groups) or any(word.text in faulty and word.key == "experiment" for word in groups):
        raise ConfigError(problems)  # without its experiment every other word would look wrong
    choices = [word.text for word in groups if word.text not in faulty]
    with _told(roots):
        tree = _compose(choices, roots)
        known = dotted_keys(OmegaConf.to_container(tree))
        unknown = {word.text: problem for word in values for problem in key_problems(word, known)}
        problems += unknown.values()
        accepted = [word for word in values if word.text not in unknown]
        for word in accepted:
            _set(tree, word)
        origins = _origins(choices, accepted, roots)
        moved = take_recipes(tree, origins)
        autos = take_autos(tree)
        unusable, is_auto = _take_dtype(tree)
        plain: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    try:
        config = parse_types(plain)
    except ConfigError as error:
        places = _places(choices, accepted, roots)
        places |= {key: places[own] for key, own in moved.items() if own in places}
        found = [*([] if unusable is None else [unusable]), *error.problems]
        raise ConfigError([*problems, *(_with_place(problem, places) for problem in found)]) from None
    config, notes = fit(config, origins)
    number_type = settle(config, this_machine(), is_auto=is_auto)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": number_type.name})})
    if unusable is not None:
        problems.append(_with_place(unusable, _places(choices, accepted, roots)))
    problems += rule_problems(config) + pipeline_problems(config)
    return Composed(config=config, problems=problems, autos=autos, notes=notes, number_type=number_type)


def take_autos(tree: DictConfig) -> tuple[str, ...]:
    """Puts the smallest value in the place of every `auto` that a plan can settle; their keys."""
    stages: Any = OmegaConf.select(tree, "stages", default={})
    smallest: dict[str, object] = {"sharding.strategy": "none", "model.gradient_checkpointing": False}
    smallest |= {f"stages.{name}.batch.micro_size": 1 for name in stages}
    autos = [key for key in smallest if OmegaConf.select(tree, key, default=None) == AUTO]
    for key in autos:
        OmegaConf.update(tree, key, smallest[key], force_add=True)
    return tuple(key.removesuffix(".strategy") for key in autos)


def _take_dtype(tree: DictConfig) -> tuple[str | None, bool]:
    """Puts a valid type in the place of an `auto`, or of a value that is none: (what is wrong with it, whether it was `auto`)."""
    value: object = OmegaConf.select(tree, NUMBER_TYPE, default=None)
    if value is None:
        return None, False  # the types report a missing key
    problem = dtype_problem(value)
    if problem is not None or value == AUTO:
        OmegaConf.update(tree, NUMBER_TYPE, "float32", force_add=True)
    return problem, value == AUTO


def presets(group: str, config_directory: Path | None = None) -> dict[str, Any]:
    """The plain content of every file of a group, by its name."""
    roots = _roots(config_directory)
    files = {name: _file_of(f"{group}/{name}", roots) for name in choices_of(group, roots)}
    return {name: OmegaConf.to_container(OmegaConf.load(file)) for name, file in files.items() if file is not None}


def experiments(config_directory: Path | None = None) -> list[str]:
    """Names that may follow +experiment=."""
    return choices_of("experiment", _roots(config_directory))


def _roots(config_directory: Path | None) -> list[Path]:
    """Folders with config groups; a file of an earlier one hides a file of the same name in a later one."""
    if config_directory is None:
        return [CONF]
    if not config_directory.is_dir():
        raise ConfigError(f"--config-dir: {config_directory} is no folder")
    return [config_directory.resolve(), CONF]


def _parse(overrides: Sequence[str], experiments: Sequence[str]) -> tuple[list[Override], list[str]]:
    words: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        if text in experiments:
            problems.append(f"{text} is no override; did you mean +experiment={text}?")
            continue
        try:
            words.append(parse_word(text))
        except ConfigError as error:
            problems += error.problems
    return words, problems


def _compose(choices: Sequence[str], roots: Sequence[Path]) -> DictConfig:
    """The tree of the chosen files.

    Hydra also composes settings of its own, which nothing here reads and which take half of the time: they are left out
    where no file speaks of them.
    """
    from hydra import compose as hydra_compose
    from hydra._internal.config_repository import CachingConfigRepository
    from hydra._internal.defaults_list import create_defaults_list
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _hydra(roots) as loader:
        if _speaks_of_hydra(roots):
            return hydra_compose("config", overrides=list(choices))
        files = CachingConfigRepository(loader.repository)
        words = OverridesParser.create().parse_overrides(list(choices))
        chosen = create_defaults_list(
            repo=files, config_name="config", overrides_list=words, prepend_hydra=False, skip_missing=False
        )
        return loader._compose_config_from_defaults_list(chosen.defaults, files)  # pyright: ignore[reportPrivateUsage]


def _speaks_of_hydra(roots: Sequence[Path]) -> bool:
    """Whether a file may hold a `hydra:` section (a search path, say), or choose one of Hydra's own groups."""
    return any(b"hydra" in file.read_bytes() for root in roots for file in root.rglob("*.yaml") if file.is_file())


def _set(tree: DictConfig, word: Override) -> None:
    """Sets or deletes one key, as Hydra would; a key that is not there is added, since the types judge all keys."""
    if not word.deletes:
        OmegaConf.update(tree, word.key, word.value, force_add=True)
        return
    parent, _, name = word.key.rpartition(".")
    node: Any = OmegaConf.select(tree, parent) if parent else tree
    with open_dict(tree):
        del node[name]


@contextmanager
def _told(roots: Sequence[Path]) -> Generator[None]:
    """Turns the errors of Hydra, OmegaConf and YAML into sentences."""
    from hydra.errors import HydraException

    from orchestrator.places import unreadable_files

    try:
        yield
    except HydraException as error:
        raise ConfigError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_one_line(error)}") from None
    except (YAMLError, ValueError, TypeError, AttributeError, OSError):
        problems = unreadable_files(roots)
        if problems:
            raise ConfigError(problems) from None
        raise


@contextmanager
def _hydra(roots: Sequence[Path]) -> Generator[ConfigLoaderImpl]:
    """Hydra over the folders, the first of them first."""
    from hydra import initialize_config_dir
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(config_dir=str(roots[-1]), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        for root in reversed(roots[:-1]):  # hydra.searchpath would put them last, and hide them
            loader.config_search_path.prepend("folder of the user", f"file://{root}", "main")
        loader.repository.initialize_sources(loader.config_search_path)
        yield loader


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's words without what only their authors need."""
    words = " ".join(str(error).split())
    return words.split(" Config search path:")[0].split(" full_key:")[0]


def _places(choices: Sequence[str], accepted: Sequence[Override], roots: Sequence[Path]) -> dict[str, str]:
    """FILE:LINE of every key that a file gave its value; keys that a word of the command line set are left out."""
    from hydra.types import RunMode

    from orchestrator.places import find_places

    with _hydra(roots) as loader:
        defaults = loader.compute_defaults_list("config", list(choices), RunMode.RUN).defaults
    found = [(_file_of(str(entry.config_path), roots), str(entry.package or "")) for entry in defaults]
    places = find_places((file, package) for file, package in found if file is not None)
    for file in [file for file, package in found if package == "experiment"]:
        places["experiment"] = f"{file}:1"
    typed = {word.key for word in accepted}
    return {key: place for key, place in places.items() if not any(_related(key, word) for word in typed)}


def _origins(choices: Sequence[str], accepted: Sequence[Override], roots: Sequence[Path]) -> Origins:
    """Where values come from. Files are looked through only where a folder of the user's takes part: it costs a composition."""
    find = None if len(roots) == 1 else cache(lambda: _places(choices, (), roots))
    return Origins(typed=tuple(word.key for word in accepted), find_places=find)


def _file_of(config_path: str, roots: Sequence[Path]) -> Path | None:
    files = [root / f"{config_path}.yaml" for root in roots]
    return next((file for file in files if file.is_file()), None)


def _related(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other, or stands above it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _with_place(problem: str, places: dict[str, str]) -> str:
    key = problem.partition(": ")[0]
    if key == "experiment" and key in places:
        return f"{places[key]} must say `# @package _global_`, so that the file's keys stand at the root"
    return f"{places[key]} {problem}" if key in places else problem

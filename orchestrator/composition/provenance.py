"""The composed values, each with its source: file and line, or the command line. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from orchestrator.composition.compose import Tree, build_tree, origins_of, roots_of
from orchestrator.composition.experiment_file import Sources, is_experiment_file, open_sources
from orchestrator.composition.hydra_tree import as_sentences, chosen_files
from orchestrator.composition.overrides import CONF, dotted_keys
from orchestrator.composition.recipes import take_recipes
from orchestrator.composition.yaml_locations import find_key_locations

COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """Plain values, and the source of each leaf by its dotted key."""

    values: dict[str, Any]
    sources: Mapping[str, str]
    problems: tuple[str, ...]
    """Problems of invalid overrides; the values come from the others."""


def sourced(overrides: Sequence[str], *, config_directory: Path | None) -> Sourced:
    """The composed values before a plan settles `auto`; ConfigError if nothing can be composed."""
    with open_sources(overrides, roots_of(config_directory)) as (rest, sources):
        found = build_tree(rest, sources)
        with as_sentences(sources.roots):
            moved = take_recipes(found.tree, origins_of(found, sources))
            values: Any = OmegaConf.to_container(found.tree, resolve=True)
        locations = _locations(found, sources)
        locations |= {key: locations[own] for key, own in moved.items() if own in locations}
    return Sourced(
        values=values,
        sources={key: _source(key, locations) for key, _ in leaves(values)},
        problems=tuple(found.problems),
    )


def experiment_alone(overrides: Sequence[str]) -> list[str]:
    """Only the overrides that choose the experiment."""
    return [text for text in overrides if is_experiment_file(text) or text.lstrip("+").startswith("experiment=")]


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty map is a leaf."""
    for name, value in cast("dict[str, Any]", tree).items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _locations(found: Tree, sources: Sources) -> dict[str, str]:
    """The source of every key's value, including inner nodes."""
    files = find_key_locations(chosen_files(found.choices, sources.roots), with_references=True)
    locations = {key: _short(sources.as_given(location)) for key, location in files.items()}
    if sources.default_name() is not None:
        locations["name"] = f"{sources.file} (its own name)"
    for override in found.values:
        inner = dotted_keys(override.value)
        if not inner:
            # Values that an earlier file set below this key are overwritten.
            locations = {key: location for key, location in locations.items() if not key.startswith(f"{override.key}.")}
        locations |= dict.fromkeys([override.key, *(f"{override.key}.{key}" for key in inner)], COMMAND_LINE)
    return locations


def _source(key: str, locations: Mapping[str, str]) -> str:
    """The source of the key itself or of its nearest ancestor."""
    parts = key.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((locations[name] for name in above if name in locations), "")


def _short(location: str) -> str:
    """Our files as conf/GROUP/FILE:LINE, others relative to the working folder if they are below it."""
    for folder, prefix in ((CONF, "conf/"), (Path.cwd(), "")):
        if location.startswith(f"{folder}/"):
            return prefix + location.removeprefix(f"{folder}/")
    return location

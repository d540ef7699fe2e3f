"""Applies overrides to a frozen configuration, which has no files or interpolations left. Must not import torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from orchestrator.composition.compose import presets
from orchestrator.composition.overrides import (
    CONF,
    Override,
    chooses_group,
    dotted_keys,
    duplicated_keys,
    group_problems,
    key_problems,
    parse_override,
)
from orchestrator.config.base import JsonValue
from orchestrator.errors import ConfigError


def changed_values(values: dict[str, JsonValue], overrides: Sequence[str]) -> dict[str, JsonValue]:
    """The configuration with the overrides applied; ConfigError with every problem. Groups whose files need no others
    may be chosen.
    """
    tree = copy.deepcopy(values)
    known = dotted_keys(tree)
    problems = duplicated_keys(overrides)
    for text in overrides:
        try:
            override = parse_override(text)
            found = _problems(override, known)
            if not found:
                _apply(tree, override)
            problems += found
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tree


def _problems(override: Override, known: Sequence[str]) -> list[str]:
    if chooses_group(override, [CONF]):
        return group_problems(override, [CONF])
    if override.deletes:
        return [f"{override.text}: a fork keeps every key; give it another value"]
    return key_problems(override, known)


def _apply(tree: dict[str, JsonValue], override: Override) -> None:
    if chooses_group(override, [CONF]):
        _set(tree, override.key.partition("@")[2] or override.key, _preset(override))
        return
    seeds = tree.get("seeds")
    if override.key == "seed" and isinstance(seeds, dict):  # in a composed file the seeds follow it
        tree["seeds"] = {
            key: cast(JsonValue, override.value) if value == tree["seed"] else value for key, value in seeds.items()
        }
    _set(tree, override.key, cast(JsonValue, override.value))


def _preset(override: Override) -> JsonValue:
    content: Any = presets(override.group)[str(override.value)]
    if "defaults" in content or "${" in str(content):
        raise ConfigError(
            f"{override.text}: this file includes others, which a fork does not compose; set its keys one by one"
        )
    return content


def _set(tree: dict[str, JsonValue], key: str, value: JsonValue) -> None:
    *parents, name = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value

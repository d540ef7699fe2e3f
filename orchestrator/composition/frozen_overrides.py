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


def changed_values(values: dict[str, JsonValue], words: Sequence[str]) -> dict[str, JsonValue]:
    """The configuration with the overrides applied; ConfigError with every problem. Groups whose files need no others
    may be chosen.
    """
    tree = copy.deepcopy(values)
    known = dotted_keys(tree)
    problems = duplicated_keys(words)
    for text in words:
        try:
            word = parse_override(text)
            found = _problems(word, known)
            if not found:
                _apply(tree, word)
            problems += found
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tree


def _problems(word: Override, known: Sequence[str]) -> list[str]:
    if chooses_group(word, [CONF]):
        return group_problems(word, [CONF])
    if word.deletes:
        return [f"{word.text}: a fork keeps every key; give it another value"]
    return key_problems(word, known)


def _apply(tree: dict[str, JsonValue], word: Override) -> None:
    if chooses_group(word, [CONF]):
        _set(tree, word.key.partition("@")[2] or word.key, _preset(word))
        return
    seeds = tree.get("seeds")
    if word.key == "seed" and isinstance(seeds, dict):  # in a composed file the seeds follow it
        tree["seeds"] = {
            key: cast(JsonValue, word.value) if value == tree["seed"] else value for key, value in seeds.items()
        }
    _set(tree, word.key, cast(JsonValue, word.value))


def _preset(word: Override) -> JsonValue:
    content: Any = presets(word.group)[str(word.value)]
    if "defaults" in content or "${" in str(content):
        raise ConfigError(
            f"{word.text}: this file includes others, which a fork does not compose; set its keys one by one"
        )
    return content


def _set(tree: dict[str, JsonValue], key: str, value: JsonValue) -> None:
    *parents, name = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value

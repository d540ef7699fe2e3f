"""Finds the file and line that set each key of the composed configuration, and invalid YAML files.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from orchestrator.config.base import JsonValue


def find_key_locations(files: Iterable[tuple[Path, str]], *, with_references: bool = False) -> dict[str, str]:
    """Dotted key -> FILE:LINE, from (file, package) in the order of composition: a later file wins.

    Values that refer to another key (`${seed}`) are omitted unless asked for, since an error in them belongs to that
    key.
    """
    locations: dict[str, str] = {}
    for file, package in files:
        node = cast(Any, yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))  # pyright: ignore
        prefix = f"{package}." if package else ""
        locations |= {
            key: f"{file}:{line}"
            for key, line in _key_lines(node, prefix, with_references)
            if key != f"{prefix}defaults"
        }
    return locations


def unreadable_files(roots: Sequence[Path]) -> list[str]:
    """One sentence for every YAML file in the folders that cannot be read as keys and values."""
    files = [file for root in roots for file in sorted(root.rglob("*.yaml")) if file.is_file()]
    return [problem for file in files for problem in file_problems(file)]


def file_problems(file: Path) -> list[str]:
    from omegaconf import OmegaConf

    try:
        OmegaConf.load(file)  # stricter than YAML: no duplicate keys
        content: JsonValue = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        return [f"{file}:{line} is not YAML: {error.problem}"]
    except (yaml.YAMLError, UnicodeError) as error:
        return [f"{file} is not YAML: {' '.join(str(error).split())}"]
    except OSError as error:
        return [f"{file} cannot be read: {error.strerror}"]
    if content is None:
        return []
    if not isinstance(content, dict):
        return [f"{file} holds a {type(content).__name__}; lines of `key: value` are expected"]
    if not isinstance(content.get("defaults", []), list):
        return [f"{file}: defaults must be a list of `- group: choice`"]
    return []


def _key_lines(node: Any, prefix: str, with_references: bool) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key below a node."""
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _key_lines(entry, f"{prefix}{number}.", with_references)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not with_references and isinstance(value, yaml.ScalarNode) and "${" in value.value:
            continue
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _key_lines(value, f"{prefix}{key.value}.", with_references)

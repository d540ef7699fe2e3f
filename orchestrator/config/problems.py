"""Turns pydantic's errors into sentences that name the key, the fault and the nearest key; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.base import JsonValue, Section
from orchestrator.errors import nearest


def problem_sentences(error: ValidationError, values: dict[str, JsonValue], root: type[Section]) -> list[str]:
    """One sentence for each error of a failed validation of `values` as `root`."""
    return [_sentence(item, values, root) for item in error.errors()]


def field_names(root: type[Section], path: Sequence[str]) -> set[str]:
    """Names of the fields that may stand under `path` (every alternative of a union counts)."""
    classes = {root}
    for name in path:
        classes = {found for cls in classes for found in _step(cls, name)}
    return {name for cls in classes for name in cls.model_fields}


def _step(cls: type[Section], name: str) -> set[type[Section]]:
    if name in cls.model_fields:
        return _sections(cls.model_fields[name].annotation)
    return set()


def _sections(annotation: Any) -> set[type[Section]]:
    """Every Section class inside an annotation, through unions, containers and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}
    return {found for inner in get_args(annotation) for found in _sections(inner)}


def _sentence(item: ErrorDetails, values: dict[str, JsonValue], root: type[Section]) -> str:
    path = _path(item, values)
    dotted = ".".join(path)
    match item["type"]:
        case "extra_forbidden":
            allowed = field_names(root, _without_map_keys(path[:-1]))
            guess = nearest(path[-1], allowed)
            hint = f"did you mean {guess}?" if guess else f"allowed are {', '.join(sorted(allowed))}"
            return f"{dotted}: unknown key; {hint}"
        case "missing":
            return f"{dotted}: this key is missing"
        case "union_tag_invalid":
            context = item.get("ctx", {})
            return f"{dotted}.{str(context['discriminator']).strip(chr(39))}: {context['tag']!r} is not one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{dotted}: a group was expected, not {_shown(item['input'])}"
        case _:
            return f"{dotted}: {_lower(item['msg'])}, not {_shown(item['input'])}"


def _path(item: ErrorDetails, values: JsonValue) -> list[str]:
    """The location without the union tags that pydantic puts between the keys."""
    path: list[str] = []
    here = values
    for position, part in enumerate(item["loc"]):
        last = position == len(item["loc"]) - 1
        below = _below(here, part)
        if below is not None:
            (here,) = below
        elif not (last and item["type"] == "missing"):
            continue
        path.append(str(part))
    return path


def _below(tree: JsonValue, part: int | str) -> tuple[JsonValue] | None:
    """The value under a key or a position, in a tuple since it may be null; None where there is none."""
    if isinstance(tree, dict):
        return (tree[part],) if isinstance(part, str) and part in tree else None
    if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
        return (tree[part],)
    return None


def _without_map_keys(path: Sequence[str]) -> list[str]:
    """`stages.sft.data.mix.0` -> `stages.data.mix`: the name of a stage or of a set, and a position, are no fields."""
    is_stage = path[:1] == ["stages"]
    names = ((1, 3) if list(path[2:3]) == ["sets"] else (1,)) if is_stage else ()
    return [name for place, name in enumerate(path) if place not in names and not name.isdecimal()]


def _shown(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:80]


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]

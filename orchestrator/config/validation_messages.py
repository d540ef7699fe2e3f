"""Turns pydantic's errors into sentences that name the key, the fault and the nearest key. Must not import torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.base import IDENTIFIER_PATTERN, JsonValue, Section
from orchestrator.config.key_hints import field_hint

DISCRIMINATORS = ("kind", "method", "scheme", "strategy")
"""Fields that discriminate the alternatives of a union."""
PATTERNS = {
    IDENTIFIER_PATTERN: 'letters, digits, ".", "_" and "-" are allowed, up to 100 of them, the first a letter or a digit',
    r"^(all|none|(first|last) [1-9][0-9]*)$": "all, none, first N or last N is allowed, or a list of layers' numbers",
    r"^(default|loftq|pissa|pissa_niter_[1-9][0-9]*)$": "default, loftq, pissa or pissa_niter_N is allowed",
    r"^\d{4}-\d{2}-\d{2}$": "a date as YYYY-MM-DD is needed",
}
"""Every pattern of the configuration's fields, in plain English."""


def problem_sentences(error: ValidationError, values: dict[str, JsonValue], root: type[Section]) -> list[str]:
    """One sentence for each error of a failed validation of `values` as `root`."""
    return [_sentence(item, values, root) for item in error.errors()]


def missing_paths(error: ValidationError, values: dict[str, JsonValue]) -> list[list[str]]:
    """Locations where a failed validation missed a key, as paths of keys."""
    return [_path(item, values) for item in error.errors() if item["type"] == "missing"]


def field_names(root: type[Section], path: Sequence[str], values: JsonValue) -> set[str]:
    """Names of the fields that may be under `path` (of a union, those of the alternative that the values choose)."""
    classes: set[type[Section]] = {root}
    for name in path:
        below = _below(values, int(name) if name.isdecimal() else name)
        values = None if below is None else below[0]
        found = {section for cls in classes for section in _step(cls, name)}
        # Names of stages or sets and list indices are not fields: the classes stay the same and the values choose among
        # them.
        classes = {cls for cls in found or classes if _is_chosen(cls, values)} or found or classes
    return {name for cls in classes for name in cls.model_fields}


def _is_chosen(cls: type[Section], values: JsonValue) -> bool:
    """Whether the values do not select another alternative by `kind`, `method` or a similar field."""
    if not isinstance(values, dict):
        return True
    tags = {name: get_args(cls.model_fields[name].annotation) for name in DISCRIMINATORS if name in cls.model_fields}
    return all(values.get(name) in allowed for name, allowed in tags.items() if allowed and name in values)


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
            allowed = field_names(root, path[:-1], values)
            guess = field_hint(path[-1], allowed)
            hint = f"did you mean {guess}?" if guess else f"allowed are {', '.join(sorted(allowed))}"
            return f"{dotted}: unknown key; {hint}"
        case "missing":
            return f"{dotted}: this key is missing"
        case "string_pattern_mismatch":
            return _mismatch(dotted, item)
        case "union_tag_invalid":
            context = item.get("ctx", {})
            return f"{dotted}.{str(context['discriminator']).strip(chr(39))}: {context['tag']!r} is not one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{dotted}: a group was expected, not {_shown(item['input'])}"
        case "model_type" | "tuple_type" if isinstance(item["input"], str) and _takes_functions(path, values, root):
            key = ".".join(path[:-1]) if path[-1].isdecimal() else dotted
            typed = shlex.quote(f"{key}=[{{source: {item['input']}}}]")
            return f"{dotted}: a function is a map with its source, not {_shown(item['input'])}; type {typed}"
        case _:
            return f"{dotted}: {_lower(item['msg'])}, not {_shown(item['input'])}"


def _takes_functions(path: Sequence[str], values: JsonValue, root: type[Section]) -> bool:
    """Whether the key is a list of functions, or an item of one; a bare name there is the usual slip."""
    return {"source", "options"} <= field_names(root, path, values)


def _mismatch(dotted: str, item: ErrorDetails) -> str:
    """What a text may contain, in plain English rather than as a regular expression."""
    pattern = str(item.get("ctx", {})["pattern"])
    given = str(item["input"])
    sentence = f"{dotted}: {PATTERNS[pattern]}, not {_shown(given)}"
    repaired = re.sub(r"[^A-Za-z0-9._-]+", "_", given).strip("._-")
    is_name = pattern == IDENTIFIER_PATTERN and re.fullmatch(pattern, repaired)
    return f"{sentence}; try {dotted}={repaired}" if is_name else sentence


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
    """The value under a key or index, in a tuple because it may be null; None if there is none."""
    if isinstance(tree, dict):
        return (tree[part],) if isinstance(part, str) and part in tree else None
    if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
        return (tree[part],)
    return None


def _shown(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:80]


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]

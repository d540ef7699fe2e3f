"""Values that Hydra's grammar cannot read, or reads as something other than the intended text.

Must not import torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

_ASSIGNMENT = re.compile(r"(?P<mark>\+{0,2})(?P<key>[A-Za-z_][\w./-]*(@[\w.-]+)?)=(?P<value>.*)", re.DOTALL)
_AMBIGUOUS = ("[", "{", '"', "'")
"""First characters of a list, a map or a quoted text: such a value was intended and contains an error."""


def literal_parts(text: str) -> tuple[str, str, str] | None:
    """Mark (+, ++), key and value of `key=value`; None if the text has another form."""
    match = _ASSIGNMENT.fullmatch(text)
    return None if match is None else (match["mark"], match["key"], match["value"])


def may_be_literal(value: str) -> bool:
    """Whether a value that the grammar refuses can only be meant literally."""
    return bool(value) and not value.startswith(_AMBIGUOUS) and "${" not in value


def quoted(key: str, value: str) -> str:
    """`key=value` quoted so that both a shell and Hydra's grammar preserve the value."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def takes_text_only(key: str) -> bool:
    """Whether a key accepts only text (or null), so that `name=2024` means the four digits."""
    found = list(annotations_of(key))
    return bool(found) and all(_is_text(annotation) for annotation in found)


def names_existing_file(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def annotations_of(key: str) -> Iterator[Any]:
    """The annotation of a dotted key in every alternative that has it."""
    from orchestrator.config.run import RunConfig  # imported here, since `--help` reads this module and needs no types

    annotations: list[Any] = [RunConfig]
    for part in key.split("."):
        annotations = [found for annotation in annotations for found in _below(annotation, part)]
    yield from annotations


def _below(annotation: Any, part: str) -> Iterator[Any]:
    """The types below one part of a key: a field of a section, the values of a map, the elements of a list."""
    from orchestrator.config.base import Section

    if isinstance(annotation, type) and issubclass(annotation, Section):
        if part in annotation.model_fields:
            yield annotation.model_fields[part].annotation
        return
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        yield inner[1]
    elif get_origin(annotation) is tuple:
        if part.isdecimal():
            yield inner[0]
    else:
        for alternative in inner:
            yield from _below(alternative, part)


def _is_text(annotation: Any) -> bool:
    if annotation in (str, NoneType):
        return True
    inner = [each for each in get_args(annotation) if isinstance(each, type) or get_args(each)]
    return get_origin(annotation) not in (dict, tuple) and bool(inner) and all(_is_text(each) for each in inner)

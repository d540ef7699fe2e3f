"""The values that a key may have if they are few, from its type; for completion. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from orchestrator.composition.literals import annotations_of
from orchestrator.config.autos import AUTO, takes_auto


def allowed_values(key: str) -> list[str]:
    """`true` and `false` of a switch, the names of a choice, `null` and `auto` if allowed; nothing for free text."""
    typed = [value for annotation in annotations_of(key) for value in _values(annotation)]
    return list(dict.fromkeys([*([AUTO] if takes_auto(key) else []), *typed]))


def _values(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif annotation is type(None):
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) not in (dict, tuple):
        for inner in get_args(annotation):
            yield from _values(inner)

"""The examples that rows of any format become, and the report of a faulty row. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config.data import DataFormat

Row = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation rendered by the chat template; `trained[i]` says whether message i is trained on."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that bypasses the chat template: `completion` is trained on, `prompt` is not."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate from, not trained on directly."""

    messages: tuple[Message, ...] | None
    tools: tuple[dict[str, Any], ...] | None
    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text or two with a class or a number to predict; encoded as the tokenizer itself encodes them."""

    text: str
    pair: str | None


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file: one document, or two (chosen, rejected), with its extra fields."""

    documents: tuple[Chat | Plain | Prompt | Labelled, ...]
    value: float | None = None
    """Margin of a preference, label (0 or 1) of a feedback, number of a classification."""
    extra: str | None = None
    """JSON of the fields that a reward needs (reference answers); for a classification, its label and the true one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the rows of a source are read: format, columns, and the treatment of rows without a label."""

    format: DataFormat
    columns: Mapping[str, str]
    unlabelled: Literal["refuse", "drop", "keep"]
    no_label: int | str | None


class RowProblem(Exception):
    """One row cannot be used: its `field` is `found` instead of `expected`; `code` names the fault."""

    def __init__(self, field: str, found: str, expected: str, *, code: str = "wrong_type") -> None:
        self.field, self.found, self.expected, self.code = field, found, expected, code
        super().__init__(f"{field} {found}, {expected} expected")


def kind_of(value: object) -> str:
    """A value's type in a user's terms."""
    if value is None:
        return "is null"
    if isinstance(value, bool):
        return f"is {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"is the number {value}"
    if isinstance(value, str):
        return "is text" if value.strip() else "is empty"
    if isinstance(value, list):
        return "is a list"
    if isinstance(value, dict):
        return "is an object"
    return f"is of type {type(value).__name__}"


def text_of(row: Row, field: str, *, name: str | None = None, empty: bool = False) -> str:
    if field not in row:
        raise RowProblem(name or field, "is missing", "text", code="missing_field")
    value = row[field]
    if not isinstance(value, str):
        raise RowProblem(name or field, kind_of(value), "text")
    if not empty and not value.strip():
        raise RowProblem(name or field, "is empty", "text", code="empty_message")
    return value


def optional_text_of(row: Row, field: str, *, name: str | None = None) -> str:
    return "" if row.get(field) is None else text_of(row, field, name=name, empty=True)

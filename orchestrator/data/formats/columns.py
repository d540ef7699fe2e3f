"""Maps the columns of a file to the fields of a format: common names, and the mapping to type.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config.data import DataFormat
from orchestrator.config.stage import RowKind
from orchestrator.errors import nearest

NEEDED: Mapping[DataFormat, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "feedback": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "classification": ("text", "label"),
    "text": ("text",),
    "prompts": ("prompt",),
}
"""Fields by which a format is detected; the first match wins, the most specific format first."""
OPTIONAL: Mapping[DataFormat, tuple[str, ...]] = {
    "preference": ("prompt", "instruction", "input", "system", "margin", "tools"),
    "feedback": ("tools",),
    "prompt_completion": ("tools",),
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "classification": ("text_pair", "true_label"),
    "text": (),
    "prompts": ("instruction", "input", "system", "tools"),
}
KINDS: Mapping[DataFormat, RowKind] = {
    "alpaca": "text",
    "messages": "text",
    "sharegpt": "text",
    "prompt_completion": "text",
    "text": "text",
    "preference": "pair",
    "feedback": "feedback",
    "classification": "class",
    "prompts": "prompt",
}
"""The kind of rows that a format provides to a stage."""

# Names in public data sets, the most common first. A pair of them is never mapped silently: which column is trained on,
# and whether it goes through the chat template, is the user's decision; the refusal contains the mapping to paste.
PROMPTS = (
    "instruction",
    "question",
    "prompt",
    "query",
    "problem",
    "input",
    "user",
    "human",
    "request",
)
ANSWERS = (
    "output",
    "response",
    "answer",
    "completion",
    "solution",
    "reply",
    "assistant",
    "gpt",
    "model_answer",
    "target",
    "chosen",
)
CHOSEN = ("chosen", "chosen_response", "response_chosen", "preferred", "accepted", "better", "winner", "positive")
REJECTED = (
    "rejected",
    "rejected_response",
    "response_rejected",
    "dispreferred",
    "unpreferred",
    "worse",
    "loser",
    "negative",
)
TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "comment",
    "tweet",
    "document",
    "body",
    "utterance",
    "question",
    "title",
)
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "rating", "stars")
GOOD = ("label", "thumbs_up", "is_good", "liked", "desirable", "good")
CONTEXTS = ("input", "context", "passage")
SYSTEMS = ("system", "system_prompt", "system_message")


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], data_format: DataFormat | None) -> dict[str, Any]:
    """The row with every mapped column under its field.

    A mapped column no longer counts under its own name as an optional field: with {instruction: input} there is no
    `input` left, and with {instruction: prompt} a preference has no plain prompt.
    """
    fields = dict(row)
    spare = OPTIONAL[data_format] if data_format is not None else ()
    also = ("prompt",) if data_format == "prompts" and "instruction" in columns else ()
    for column in set(columns.values()) - set(columns):
        if column in spare or column in also:
            del fields[column]
    return fields | {field: row[column] for field, column in columns.items() if column in row}


def detect(row: object, columns: Mapping[str, str] | None = None) -> DataFormat | None:
    """The format of a row by its fields, or None. A mapping decides between several: the format must have all its fields."""
    if not isinstance(row, dict):
        return None
    columns = columns or {}
    fields: set[Any] = {*row, *(field for field, column in columns.items() if column in row)}  # pyright: ignore[reportUnknownVariableType]
    fitting: list[DataFormat] = [name for name, needed in NEEDED.items() if fields.issuperset(needed)]
    mapped: list[DataFormat] = [name for name in fitting if set(columns) <= {*NEEDED[name], *OPTIONAL[name]}]
    return next(iter(mapped or fitting), None)


def past_template(row: Mapping[str, Any], columns: Mapping[str, str], data_format: DataFormat) -> dict[str, str] | None:
    """For rows whose plain-text prompt bypasses the chat template: the mapping that renders it with the template."""
    column = columns.get("prompt", "prompt")
    if data_format not in ("prompt_completion", "preference", "prompts") or "instruction" in columns:
        return None
    if not isinstance(row.get(column), str):
        return None
    kept = {field: name for field, name in columns.items() if field not in ("prompt", "completion")}
    answer = {"output": columns.get("completion", "completion")} if data_format == "prompt_completion" else {}
    return {"instruction": column, **answer, **kept}


def mapping_problem(data_format: DataFormat, columns: Mapping[str, str], row: Mapping[str, Any]) -> str | None:
    """Why a mapping is invalid: a field that the format lacks, or a column that the file lacks."""
    known = (*NEEDED[data_format], *OPTIONAL[data_format])
    for field, column in columns.items():
        if column not in row:
            return f"{field}: {column}: the file has no such column; {_hint(column, list(map(str, row)))}"
        if (
            field not in known and data_format != "prompts"
        ):  # all other columns of a prompt's row are its reference, under any name
            return f"{field}: format {data_format} has no such field; {_hint(field, known)}"
    return None


def suggested(names: Sequence[str], kind: str) -> dict[str, str] | None:
    """The mapping that makes rows of a kind (`text`, `pair`, ...) from these columns; None if no pair is known.

    Fields whose column already has the right name are omitted.
    """
    found = _fields(names, kind)
    return None if found is None else {field: column for field, column in found.items() if field != column}


def mapping_override(field: str, mapping: Mapping[str, str]) -> str:
    """What to type: FIELD.columns='{instruction: question, output: answer}'."""
    return f"{field}.columns='{{{', '.join(f'{name}: {column}' for name, column in mapping.items())}}}'"


def _fields(names: Sequence[str], kind: str) -> dict[str, str] | None:
    prompt, answer = _first(names, PROMPTS), _first(names, ANSWERS)
    match kind:
        case "text" if prompt and answer:
            return {"instruction": prompt, "output": answer, **_context(names, prompt)}
        case "pair":
            chosen, rejected = _first(names, CHOSEN), _first(names, REJECTED)
            asked = {} if prompt is None else {"prompt": prompt}
            return {**asked, "chosen": chosen, "rejected": rejected} if chosen and rejected else None
        case "feedback":
            good = _first(names, GOOD)
            return {"prompt": prompt, "completion": answer, "label": good} if prompt and answer and good else None
        case "class":
            label = _first(names, LABELS)
            text = _first([name for name in names if name != label], TEXTS)
            return {"text": text, "label": label} if text and label else None
        case "prompt" if prompt:
            return {"prompt": prompt}
        case _:
            return None


def _context(names: Sequence[str], prompt: str) -> dict[str, str]:
    """Optional fields of the alpaca format."""
    rest = [name for name in names if name != prompt]
    found = {"input": _first(rest, CONTEXTS), "system": _first(rest, SYSTEMS)}
    return {field: column for field, column in found.items() if column is not None}


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The column whose name, ignoring case, comes first among the known ones."""
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in known if name in lowered), None)


def _hint(name: str, known: Sequence[str]) -> str:
    guess = nearest(name, known)
    return f"did you mean {guess}?" if guess else f"there are {', '.join(known)}"

"""Turns rows of a file into examples of one shape: detection, checks and semantics of the formats.

Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from orchestrator.config.data import DataFormat
from orchestrator.data.formats.columns import renamed
from orchestrator.data.formats.conversations import chat_of, conversation, sharegpt_turn, tools_of
from orchestrator.data.formats.examples import (
    Chat,
    Example,
    Labelled,
    Message,
    Plain,
    Prompt,
    Reading,
    Row,
    RowProblem,
    kind_of,
    optional_text_of,
    text_of,
)

EXPECTED_FIELDS: dict[DataFormat, str] = {
    "alpaca": "instruction, output (input, system)",
    "messages": "messages: [{role, content}] (tools)",
    "sharegpt": "conversations: [{from, value}] (system, tools)",
    "prompt_completion": "prompt, completion",
    "preference": "chosen, rejected (prompt or instruction, margin)",
    "feedback": "prompt, completion, label",
    "classification": "text, label (text_pair, true_label)",
    "text": "text",
    "prompts": "prompt or instruction (answer)",
}


def parse_row(
    row: object, data_format: DataFormat, columns: Mapping[str, str], *, labels: Reading | None = None
) -> Example:
    """The example of a row; raises RowProblem with the field, what was found and what was expected.

    `labels` is the treatment of a row without a label; None refuses it.
    """
    if not isinstance(row, dict):
        raise RowProblem("row", kind_of(row), "an object")
    fields = cast("dict[str, Any]", row)
    for field, column in columns.items():
        if column not in fields:
            raise RowProblem(column, "is missing", f"the column for {field}", code="missing_field")
    if columns:
        fields = renamed(fields, columns, data_format)
    return _classification(fields, labels) if data_format == "classification" else _PARSERS[data_format](fields)


def _alpaca_prompt(row: Row) -> tuple[Message, ...]:
    instruction, given = text_of(row, "instruction"), optional_text_of(row, "input")
    system = optional_text_of(row, "system")
    content = f"{instruction}\n\n{given}" if given.strip() else instruction
    start = ({"role": "system", "content": system},) if system.strip() else ()
    return (*start, {"role": "user", "content": content})


def _alpaca(row: Row) -> Example:
    messages = (*_alpaca_prompt(row), {"role": "assistant", "content": text_of(row, "output")})
    return Example((Chat(messages, None, (False,) * (len(messages) - 1) + (True,)),))


def _messages(row: Row) -> Example:
    if "messages" not in row:
        raise RowProblem("messages", "is missing", "a list of messages", code="missing_field")
    messages, marks = conversation(row["messages"], "messages")
    chat = chat_of(messages, marks, tools_of(row))
    if not any(chat.trained):
        raise RowProblem("messages", "has no assistant message to train", "at least one", code="zero_trained_tokens")
    return Example((chat,))


def _sharegpt(row: Row) -> Example:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        found = kind_of(turns) if "conversations" in row else "is missing"
        raise RowProblem("conversations", found, "a list of turns")
    messages: list[Any] = []
    system = optional_text_of(row, "system")
    if system.strip():
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(cast("list[Any]", turns)):
        messages.append(sharegpt_turn(turn, f"conversations[{i}]"))
    checked, marks = conversation(messages, "conversations")
    chat = chat_of(checked, marks, tools_of(row))
    if not any(chat.trained):
        raise RowProblem("conversations", "has no gpt turn to train", "at least one", code="zero_trained_tokens")
    return Example((chat,))


def _prompt_completion(row: Row) -> Example:
    return Example((_answered(row, row.get("prompt"), "completion"),))


def _answered(row: Row, prompt: object, field: str) -> Chat | Plain:
    """Prompt plus the answer in `field`: plain text if both are text, a conversation if both are messages."""
    if isinstance(prompt, str):
        return Plain(prompt, text_of(row, field))
    if not isinstance(prompt, list):
        found = kind_of(prompt) if "prompt" in row else "is missing"
        raise RowProblem("prompt", found, "text or a list of messages")
    before, _ = conversation(cast("list[Any]", prompt), "prompt")
    return _continued(before, row, field)


def _continued(before: tuple[Message, ...], row: Row, field: str) -> Chat:
    """A conversation of which only the messages of `field` are trained on."""
    value = [{"role": "assistant", "content": row[field]}] if isinstance(row.get(field), str) else row.get(field)
    after, marks = conversation(value, field)
    chat = chat_of((*before, *after), (False,) * len(before) + marks, tools_of(row))
    if not any(chat.trained):
        raise RowProblem(field, "has no assistant message", "at least one", code="zero_trained_tokens")
    return chat


def _preference(row: Row) -> Example:
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float))):
        raise RowProblem("margin", kind_of(margin), "a number")
    if row.get("prompt") is not None:
        documents = tuple(_answered(row, row["prompt"], field) for field in ("chosen", "rejected"))
    elif row.get("instruction") is not None:
        before = _alpaca_prompt(row)
        documents = tuple(_continued(before, row, field) for field in ("chosen", "rejected"))
    else:
        documents = _implicit_prompt(row)
    if documents[0] == documents[1]:
        raise RowProblem("rejected", "is the same as chosen", "another answer", code="equal_pair")
    return Example(documents, value=None if margin is None else float(margin))


def _implicit_prompt(row: Row) -> tuple[Chat | Plain, Chat | Plain]:
    """Chosen and rejected include the prompt, which is their common prefix."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = _common_text(chosen, rejected)
        return Plain(chosen[:shared], _rest(chosen, shared, "chosen")), Plain(
            rejected[:shared], _rest(rejected, shared, "rejected")
        )
    first, first_marks = conversation(chosen, "chosen")
    second, second_marks = conversation(rejected, "rejected")
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    if shared == 0:
        raise RowProblem("rejected[0]", "differs from chosen[0]", "a common prompt")
    tools = tools_of(row)
    sides: list[Chat] = []
    for messages, marks in ((first, first_marks), (second, second_marks)):
        sides.append(chat_of(messages, (False,) * shared + marks[shared:], tools))
    if not all(any(side.trained) for side in sides):
        raise RowProblem(
            "chosen", "and rejected differ in no assistant message", "two answers", code="zero_trained_tokens"
        )
    return sides[0], sides[1]


def _common_text(first: str, second: str) -> int:
    """Length of the common prefix, moved back to a word end so that no word is cut."""
    limit = min(len(first), len(second))
    shared = next((i for i in range(limit) if first[i] != second[i]), limit)
    while shared and not first[shared - 1].isspace():
        shared -= 1
    while shared and first[shared - 1] == " ":
        shared -= 1
    return shared


def _rest(text: str, start: int, field: str) -> str:
    if not text[start:].strip():
        raise RowProblem(field, "is empty after the common prompt", "an answer", code="empty_message")
    return text[start:]


def _feedback(row: Row) -> Example:
    label = row.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise RowProblem("label", kind_of(label) if "label" in row else "is missing", "true or false")
    return Example((_answered(row, row.get("prompt"), "completion"),), value=float(label))


def _classification(row: Row, labels: Reading | None = None) -> Example:
    """A label is a number, a name, or a list of either (several labels at once, or none of them)."""
    text, pair = text_of(row, "text"), optional_text_of(row, "text_pair")
    label: Any = row.get("label")
    if label in (None, "") or (labels is not None and label == labels.no_label and not isinstance(label, bool)):
        _refuse_unlabelled(row, labels)
        label = None
    elif not _is_label(label) and not _are_labels(label):
        raise RowProblem("label", kind_of(label), "a class (number or text), or a list of classes")
    known: dict[str, Any] = {"label": label}
    if row.get("true_label") is not None:
        known["true_label"] = row["true_label"]
        if not _is_label(row["true_label"]):
            raise RowProblem("true_label", kind_of(row["true_label"]), "a class (number or text)")
    value = float(label) if isinstance(label, (int, float)) else None
    return Example((Labelled(text, pair or None),), value=value, extra=json.dumps(known, ensure_ascii=False))


def _is_label(value: object) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool) and value != ""


def _are_labels(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_label, cast("list[Any]", value)))


def _refuse_unlabelled(row: Row, labels: Reading | None) -> None:
    """RowProblem, unless rows without a label are kept."""
    found = kind_of(row["label"]) if "label" in row else "is missing"
    if labels is None:
        raise RowProblem("label", found, "a class (number or text)")
    if labels.unlabelled != "keep":
        code = "unlabelled" if labels.unlabelled == "refuse" else "unlabelled_dropped"
        raise RowProblem("label", found, "a class (number or text); unlabelled=drop leaves such rows out", code=code)


def _plain_text(row: Row) -> Example:
    return Example((Plain("", text_of(row, "text")),))


def _prompts(row: Row) -> Example:
    prompt = row.get("prompt")
    extra = json.dumps({key: item for key, item in row.items() if key not in ("prompt", "tools")}, ensure_ascii=False)
    if "prompt" not in row and row.get("instruction") is not None:  # alpaca rows, which are their own reference
        return Example((Prompt(_alpaca_prompt(row), None, ""),), extra=extra)
    if isinstance(prompt, str):
        return Example((Prompt(None, None, text_of(row, "prompt")),), extra=extra)
    if prompt is None:
        raise RowProblem(
            "prompt", "is null" if "prompt" in row else "is missing", "text or a list of messages", code="missing_field"
        )
    messages, _ = conversation(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise RowProblem("prompt", "ends with an assistant message", "a prompt that waits for an answer")
    return Example((Prompt(messages, tools_of(row), ""),), extra=extra)


_Parser = Callable[[Row], Example]
_PARSERS: dict[str, _Parser] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "feedback": _feedback,
    "text": _plain_text,
    "prompts": _prompts,
}

"""Rows of a file -> examples of one shape: detection, checks and meaning of the formats; must not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.config.data import DataFormat

Row = Mapping[str, Any]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
MESSAGE_FIELDS = (
    "role",
    "content",
    "reasoning_content",
    "thinking",
    "tool_calls",
    "tool_call_id",
    "name",
    "train",
)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that goes through the chat template; `trained[i]` says whether message i is learnt."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that goes past the chat template: `completion` is learnt, `prompt` is not."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate from; nothing is learnt of it directly."""

    messages: tuple[Message, ...] | None
    tools: tuple[dict[str, Any], ...] | None
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file: one document, or two (chosen, rejected), with what comes along."""

    documents: tuple[Chat | Plain | Prompt, ...]
    value: float | None = None
    """Margin of a preference, label (0 or 1) of a feedback, class of a classification."""
    extra: str | None = None
    """JSON of what a reward needs of the row (reference answers)."""


class RowProblem(Exception):
    """One row cannot be used: `field` of it is `found` where `expected` should stand; `code` names the fault."""

    def __init__(self, field: str, found: str, expected: str, *, code: str = "wrong_type") -> None:
        self.field, self.found, self.expected, self.code = field, found, expected, code
        super().__init__(f"{field} {found}, {expected} expected")


def kind_of(value: object) -> str:
    """A value's type in the words of a user."""
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


def detect(row: object) -> DataFormat | None:
    """The format of a row by its fields, or None; the first that fits wins, the most special first."""
    if not isinstance(row, dict):
        return None
    fields = set(cast("dict[str, Any]", row))
    signs: tuple[tuple[DataFormat, set[str]], ...] = (
        ("preference", {"chosen", "rejected"}),
        ("feedback", {"prompt", "completion", "label"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("classification", {"text", "label"}),
        ("text", {"text"}),
        ("prompts", {"prompt"}),
    )
    return next((name for name, needed in signs if needed <= fields), None)


EXPECTED_FIELDS: dict[DataFormat, str] = {
    "alpaca": "instruction, output (input, system)",
    "messages": "messages: [{role, content}] (tools)",
    "sharegpt": "conversations: [{from, value}] (system, tools)",
    "prompt_completion": "prompt, completion",
    "preference": "chosen, rejected (prompt or instruction, margin)",
    "feedback": "prompt, completion, label",
    "classification": "text, label (text_pair)",
    "text": "text",
    "prompts": "prompt (answer)",
}


def parse_row(row: object, data_format: DataFormat, columns: Mapping[str, str]) -> Example:
    """The example that a row says; raises RowProblem with the field, what is there and what is expected."""
    if not isinstance(row, dict):
        raise RowProblem("row", kind_of(row), "an object")
    fields = cast("dict[str, Any]", row)
    if columns:
        fields = dict(fields)
        for field, column in columns.items():
            if column not in fields:
                raise RowProblem(column, "is missing", f"the column for {field}", code="missing_field")
        fields |= {field: fields[column] for field, column in columns.items()}
    return _PARSERS[data_format](fields)


def _text(row: Row, field: str, *, name: str | None = None, empty: bool = False) -> str:
    if field not in row:
        raise RowProblem(name or field, "is missing", "text", code="missing_field")
    value = row[field]
    if not isinstance(value, str):
        raise RowProblem(name or field, kind_of(value), "text")
    if not empty and not value.strip():
        raise RowProblem(name or field, "is empty", "text", code="empty_message")
    return value


def _optional_text(row: Row, field: str, *, name: str | None = None) -> str:
    return "" if row.get(field) is None else _text(row, field, name=name, empty=True)


def _alpaca_prompt(row: Row) -> tuple[Message, ...]:
    instruction, given = _text(row, "instruction"), _optional_text(row, "input")
    system = _optional_text(row, "system")
    content = f"{instruction}\n\n{given}" if given.strip() else instruction
    start = ({"role": "system", "content": system},) if system.strip() else ()
    return (*start, {"role": "user", "content": content})


def _alpaca(row: Row) -> Example:
    messages = (*_alpaca_prompt(row), {"role": "assistant", "content": _text(row, "output")})
    return Example((Chat(messages, None, (False,) * (len(messages) - 1) + (True,)),))


def _tools(row: Row) -> tuple[dict[str, Any], ...] | None:
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise RowProblem("tools", "is text that is not JSON", "a list of JSON schemas") from None
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list):
        raise RowProblem("tools", kind_of(value), "a list of JSON schemas")
    for i, tool in enumerate(cast("list[Any]", value)):
        if not isinstance(tool, dict):
            raise RowProblem(f"tools[{i}]", kind_of(tool), "a JSON schema")
    return tuple(cast("list[dict[str, Any]]", value))


def _tool_calls(value: object, name: str) -> list[dict[str, Any]]:
    """Calls in the shape that templates read: `arguments` as an object, also where the file holds OpenAI's JSON text."""
    if not isinstance(value, list):
        raise RowProblem(name, kind_of(value), "a list of calls")
    calls: list[dict[str, Any]] = []
    for i, call in enumerate(cast("list[Any]", value)):
        if not isinstance(call, dict):
            raise RowProblem(f"{name}[{i}]", kind_of(call), "an object")
        fields = cast("dict[str, Any]", call)
        function: Any = fields.get("function", fields)
        if not isinstance(function, dict) or not isinstance(cast("dict[str, Any]", function).get("name"), str):
            raise RowProblem(f"{name}[{i}].function.name", "is missing", "text", code="missing_field")
        called = cast("dict[str, Any]", function)
        arguments: Any = called.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise RowProblem(f"{name}[{i}].function.arguments", "is text that is not JSON", "an object") from None
        if not isinstance(arguments, dict):
            raise RowProblem(f"{name}[{i}].function.arguments", kind_of(arguments), "an object")
        extra = {key: item for key, item in fields.items() if key not in ("function", "name", "arguments")}
        calls.append({**extra, "type": "function", "function": {"name": called["name"], "arguments": arguments}})
    return calls


def _message(value: object, name: str) -> tuple[Message, bool | None]:
    """A checked message and its `train` mark (None where nothing is said)."""
    if not isinstance(value, dict):
        raise RowProblem(name, kind_of(value), "an object with role and content")
    row = cast("dict[str, Any]", value)
    role = row.get("role")
    if not isinstance(role, str):
        found = kind_of(role) if "role" in row else "is missing"
        raise RowProblem(f"{name}.role", found, f"one of {', '.join(ROLES)}", code="unknown_role")
    if role not in ROLES:
        raise RowProblem(f"{name}.role", f"is {role!r}", f"one of {', '.join(ROLES)}", code="unknown_role")
    train = row.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowProblem(f"{name}.train", kind_of(train), "true or false")
    if train and role != "assistant":
        raise RowProblem(f"{name}.train", f"is true for the role {role}", "only assistant messages to be trained")
    message: Message = {"role": role}
    calls = row.get("tool_calls")
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{name}.tool_calls")
    if role == "assistant" and calls:
        message["content"] = _optional_text(row, "content", name=f"{name}.content")
    else:
        message["content"] = _text(row, "content", name=f"{name}.content", empty=role == "tool")
    for field in ("reasoning_content", "thinking", "name", "tool_call_id"):
        if row.get(field) is not None:
            message[field] = _text(row, field, name=f"{name}.{field}", empty=True)
    return message, train


def _conversation(value: object, name: str) -> tuple[tuple[Message, ...], tuple[bool | None, ...]]:
    if not isinstance(value, list):
        raise RowProblem(name, kind_of(value), "a list of messages")
    if not value:
        raise RowProblem(name, "is an empty list", "messages", code="empty_message")
    pairs = [_message(item, f"{name}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    return tuple(message for message, _ in pairs), tuple(train for _, train in pairs)


def _chat(messages: tuple[Message, ...], marks: tuple[bool | None, ...], tools: tuple[dict[str, Any], ...] | None) -> Chat:
    trained = tuple(m["role"] == "assistant" and mark is not False for m, mark in zip(messages, marks, strict=True))
    return Chat(messages, tools, trained)


def _messages(row: Row) -> Example:
    if "messages" not in row:
        raise RowProblem("messages", "is missing", "a list of messages", code="missing_field")
    messages, marks = _conversation(row["messages"], "messages")
    chat = _chat(messages, marks, _tools(row))
    if not any(chat.trained):
        raise RowProblem("messages", "has no assistant message to train", "at least one", code="zero_trained_tokens")
    return Example((chat,))


def _sharegpt(row: Row) -> Example:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        found = kind_of(turns) if "conversations" in row else "is missing"
        raise RowProblem("conversations", found, "a list of turns")
    messages: list[Any] = []
    system = _optional_text(row, "system")
    if system.strip():
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(cast("list[Any]", turns)):
        messages.append(_sharegpt_turn(turn, f"conversations[{i}]"))
    checked, marks = _conversation(messages, "conversations")
    chat = _chat(checked, marks, _tools(row))
    if not any(chat.trained):
        raise RowProblem("conversations", "has no gpt turn to train", "at least one", code="zero_trained_tokens")
    return Example((chat,))


def _sharegpt_turn(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(name, kind_of(turn), "an object with from and value")
    fields = cast("dict[str, Any]", turn)
    speaker = fields.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        found = f"is {speaker!r}" if "from" in fields else "is missing"
        raise RowProblem(f"{name}.from", found, f"one of {', '.join(SHAREGPT_ROLES)}", code="unknown_role")
    text = _text(fields, "value", name=f"{name}.value", empty=SHAREGPT_ROLES[speaker] == "tool")
    message: Message = {"role": SHAREGPT_ROLES[speaker], "content": text, "train": fields.get("train")}
    if speaker == "function_call":
        try:
            calls: Any = json.loads(text)
        except ValueError:
            raise RowProblem(f"{name}.value", "is text that is not JSON", "a function call") from None
        message |= {"content": "", "tool_calls": cast("list[Any]", calls) if isinstance(calls, list) else [calls]}
    return message


def _prompt_completion(row: Row) -> Example:
    return Example((_answered(row, row.get("prompt"), "completion"),))


def _answered(row: Row, prompt: object, field: str) -> Chat | Plain:
    """Prompt plus the answer in `field`: plain text if both are text, a conversation if both are messages."""
    if isinstance(prompt, str):
        return Plain(prompt, _text(row, field))
    if not isinstance(prompt, list):
        found = kind_of(prompt) if "prompt" in row else "is missing"
        raise RowProblem("prompt", found, "text or a list of messages")
    before, _ = _conversation(cast("list[Any]", prompt), "prompt")
    return _continued(before, row, field)


def _continued(before: tuple[Message, ...], row: Row, field: str) -> Chat:
    """A conversation of which only the messages of `field` are learnt."""
    value = [{"role": "assistant", "content": row[field]}] if isinstance(row.get(field), str) else row.get(field)
    after, marks = _conversation(value, field)
    chat = _chat((*before, *after), (False,) * len(before) + marks, _tools(row))
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
    """Chosen and rejected hold the prompt themselves: their common beginning is the prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = _common_text(chosen, rejected)
        return Plain(chosen[:shared], _rest(chosen, shared, "chosen")), Plain(rejected[:shared], _rest(rejected, shared, "rejected"))
    first, first_marks = _conversation(chosen, "chosen")
    second, second_marks = _conversation(rejected, "rejected")
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    if shared == 0:
        raise RowProblem("rejected[0]", "differs from chosen[0]", "a common prompt")
    tools = _tools(row)
    sides: list[Chat] = []
    for messages, marks in ((first, first_marks), (second, second_marks)):
        sides.append(_chat(messages, (False,) * shared + marks[shared:], tools))
    if not all(any(side.trained) for side in sides):
        raise RowProblem("chosen", "and rejected differ in no assistant message", "two answers", code="zero_trained_tokens")
    return sides[0], sides[1]


def _common_text(first: str, second: str) -> int:
    """Length of the common beginning, moved back to the end of a word so that no word is cut."""
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


def _classification(row: Row) -> Example:
    text, pair = _text(row, "text"), _optional_text(row, "text_pair")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float, str)) or label == "":
        raise RowProblem("label", kind_of(label) if "label" in row else "is missing", "a class (number or text)")
    value = float(label) if not isinstance(label, str) else None
    return Example((Plain(text, pair),), value=value, extra=json.dumps({"label": label}))


def _plain_text(row: Row) -> Example:
    return Example((Plain("", _text(row, "text")),))


def _prompts(row: Row) -> Example:
    prompt = row.get("prompt")
    extra = json.dumps({key: item for key, item in row.items() if key not in ("prompt", "tools")}, ensure_ascii=False)
    if isinstance(prompt, str):
        return Example((Prompt(None, None, _text(row, "prompt")),), extra=extra)
    if prompt is None:
        raise RowProblem("prompt", "is null" if "prompt" in row else "is missing", "text or a list of messages", code="missing_field")
    messages, _ = _conversation(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise RowProblem("prompt", "ends with an assistant message", "a prompt that waits for an answer")
    return Example((Prompt(messages, _tools(row), ""),), extra=extra)


_Parser = Callable[[Row], Example]
_PARSERS: dict[str, _Parser] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "feedback": _feedback,
    "classification": _classification,
    "text": _plain_text,
    "prompts": _prompts,
}

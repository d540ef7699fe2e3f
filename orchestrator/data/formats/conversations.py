"""Conversations: roles, contents, tool calls, and each message's `train` mark. Must not import torch."""

from __future__ import annotations

import json
from typing import Any, cast

from orchestrator.data.formats.examples import Chat, Message, Row, RowProblem, kind_of, optional_text_of, text_of

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


def tools_of(row: Row) -> tuple[dict[str, Any], ...] | None:
    """The tools that a row offers, as JSON schemas; the file may contain them as JSON text."""
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
    """Calls in the shape that templates read: `arguments` as an object, parsed if the file has OpenAI's JSON text."""
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
    """A checked message and its `train` mark (None if absent)."""
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
        message["content"] = optional_text_of(row, "content", name=f"{name}.content")
    else:
        message["content"] = text_of(row, "content", name=f"{name}.content", empty=role == "tool")
    for field in ("reasoning_content", "thinking", "name", "tool_call_id"):
        if row.get(field) is not None:
            message[field] = text_of(row, field, name=f"{name}.{field}", empty=True)
    return message, train


def conversation(value: object, name: str) -> tuple[tuple[Message, ...], tuple[bool | None, ...]]:
    """Checked messages and their `train` marks."""
    if not isinstance(value, list):
        raise RowProblem(name, kind_of(value), "a list of messages")
    if not value:
        raise RowProblem(name, "is an empty list", "messages", code="empty_message")
    pairs = [_message(item, f"{name}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    return tuple(message for message, _ in pairs), tuple(train for _, train in pairs)


def chat_of(
    messages: tuple[Message, ...], marks: tuple[bool | None, ...], tools: tuple[dict[str, Any], ...] | None
) -> Chat:
    """A conversation whose answers are trained on, except those marked `train: false`."""
    trained = tuple(m["role"] == "assistant" and mark is not False for m, mark in zip(messages, marks, strict=True))
    return Chat(messages, tools, trained)


def sharegpt_turn(turn: object, name: str) -> Message:
    """A turn of a sharegpt conversation as a message."""
    if not isinstance(turn, dict):
        raise RowProblem(name, kind_of(turn), "an object with from and value")
    fields = cast("dict[str, Any]", turn)
    speaker = fields.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        found = f"is {speaker!r}" if "from" in fields else "is missing"
        raise RowProblem(f"{name}.from", found, f"one of {', '.join(SHAREGPT_ROLES)}", code="unknown_role")
    text = text_of(fields, "value", name=f"{name}.value", empty=SHAREGPT_ROLES[speaker] == "tool")
    message: Message = {"role": SHAREGPT_ROLES[speaker], "content": text, "train": fields.get("train")}
    if speaker == "function_call":
        try:
            calls: Any = json.loads(text)
        except ValueError:
            raise RowProblem(f"{name}.value", "is text that is not JSON", "a function call") from None
        message |= {"content": "", "tool_calls": cast("list[Any]", calls) if isinstance(calls, list) else [calls]}
    return message

"""Rows of every format: what they mean, how they are detected, and what is told of a faulty one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.data.formats.columns import detect
from orchestrator.data.formats.examples import Chat, Plain, Prompt, RowProblem
from orchestrator.data.formats.parse import parse_row

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def chat_of(row: dict[str, Any], data_format: str) -> Chat:
    document = parse_row(row, data_format, {}).documents[0]  # type: ignore[arg-type]
    assert isinstance(document, Chat)
    return document


DETECTED = [
    ({"instruction": "i", "output": "o"}, "alpaca"),
    ({"messages": [USER]}, "messages"),
    ({"conversations": []}, "sharegpt"),
    ({"prompt": "p", "completion": "c"}, "prompt_completion"),
    ({"prompt": "p", "completion": "c", "label": True}, "feedback"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference"),
    ({"text": "t", "label": 1}, "classification"),
    ({"text": "t"}, "text"),
    ({"prompt": "p", "answer": "42"}, "prompts"),
    ({"foo": 1}, None),
    ([1], None),
]


@pytest.mark.parametrize(("row", "expected"), DETECTED)
def test_detection(row: object, expected: str | None) -> None:
    assert detect(row) == expected


def test_alpaca() -> None:
    chat = chat_of({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be short."}, "alpaca")
    assert [m["content"] for m in chat.messages] == ["Be short.", "Add.\n\n1 2", "3"]
    assert chat.trained == (False, False, True)
    assert chat_of({"instruction": "Add.", "input": None, "output": "3"}, "alpaca").messages[0]["content"] == "Add."


def test_columns_are_mapped() -> None:
    example = parse_row(
        {"question": "q", "reply": "a"}, "prompt_completion", {"prompt": "question", "completion": "reply"}
    )
    assert example.documents == (Plain("q", "a"),)
    with pytest.raises(RowProblem, match=r"reply is missing, the column for completion expected"):
        parse_row({"question": "q"}, "prompt_completion", {"prompt": "question", "completion": "reply"})


def test_messages_with_tools_and_marks() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "d"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call], "train": False},
            {"role": "tool", "content": "", "name": "f"},
            ANSWER,
        ],
        "tools": json.dumps([{"type": "function"}]),
    }
    chat = chat_of(row, "messages")
    assert chat.trained == (False, False, False, False, True)
    assert chat.messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert chat.tools == ({"type": "function"},)
    assert "train" not in chat.messages[2]


def test_sharegpt() -> None:
    row = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
    }
    chat = chat_of(row, "sharegpt")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[2]["tool_calls"][0]["function"]["name"] == "f"
    assert chat.trained == (False, False, True, False, True)


def test_prompt_completion_of_messages_trains_the_completion_alone() -> None:
    chat = chat_of({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "prompt_completion")
    assert chat.trained == (False, False, False, True)


PREFERENCES: list[tuple[dict[str, Any], tuple[str, str, str]]] = [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
    ({"chosen": "Say: yes", "rejected": "Say: no way"}, ("Say:", " yes", " no way")),
]


@pytest.mark.parametrize(("row", "expected"), PREFERENCES)
def test_preference_of_text(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    first, second = parse_row(row, "preference", {}).documents
    assert isinstance(first, Plain) and isinstance(second, Plain)
    assert (first.prompt, first.completion, second.completion) == expected
    assert first.prompt == second.prompt


def test_preference_of_messages() -> None:
    other = {"role": "assistant", "content": "b"}
    rows: list[dict[str, Any]] = [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [other]},
        {"chosen": [USER, ANSWER], "rejected": [USER, other]},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    ]
    for row in rows:
        example = parse_row({**row, "margin": 2}, "preference", {})
        assert [document.messages[-1]["content"] for document in example.documents if isinstance(document, Chat)] == [
            "a",
            "b",
        ]
        assert all(isinstance(document, Chat) and document.trained == (False, True) for document in example.documents)
        assert example.value == 2.0


def test_feedback_classification_text_prompts() -> None:
    assert parse_row({"prompt": "p", "completion": "c", "label": False}, "feedback", {}).value == 0.0
    assert parse_row({"text": "t", "label": 3}, "classification", {}).value == 3.0
    assert json.loads(parse_row({"text": "t", "text_pair": "u", "label": "pos"}, "classification", {}).extra or "") == {
        "label": "pos"
    }
    assert parse_row({"text": "t"}, "text", {}).documents == (Plain("", "t"),)
    example = parse_row({"prompt": [USER], "answer": "42", "id": 7}, "prompts", {})
    assert isinstance(example.documents[0], Prompt)
    assert json.loads(example.extra or "") == {"answer": "42", "id": 7}


FAULTY: list[tuple[str, dict[str, Any], str, str]] = [
    ("alpaca", {"instruction": 5, "output": "o"}, "wrong_type", r"instruction is the number 5, text expected"),
    ("alpaca", {"instruction": "i"}, "missing_field", r"output is missing, text expected"),
    ("alpaca", {"instruction": "i", "output": " \n"}, "empty_message", r"output is empty, text expected"),
    ("alpaca", {"instruction": "i", "output": "o", "input": []}, "wrong_type", r"input is a list"),
    (
        "messages",
        {"messages": [{"role": "user", "content": ["x"]}]},
        "wrong_type",
        r"messages\[0\]\.content is a list, text expected",
    ),
    (
        "messages",
        {"messages": [{"role": "bot", "content": "x"}]},
        "unknown_role",
        r"messages\[0\]\.role is 'bot', one of system",
    ),
    ("messages", {"messages": [USER]}, "zero_trained_tokens", r"no assistant message"),
    ("messages", {"messages": []}, "empty_message", r"messages is an empty list"),
    ("messages", {"messages": "x"}, "wrong_type", r"messages is text, a list of messages expected"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        "empty_message",
        r"messages\[1\]\.content is empty",
    ),
    ("messages", {"messages": [dict(USER, train=True), ANSWER]}, "wrong_type", r"train is true for the role user"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
        "missing_field",
        r"name is missing",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "wrong_type",
        r"arguments is text that is not JSON",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "alien", "value": "x"}]},
        "unknown_role",
        r"conversations\[0\]\.from is 'alien'",
    ),
    ("sharegpt", {"conversations": None}, "wrong_type", r"conversations is null"),
    ("prompt_completion", {"prompt": "p", "completion": None}, "wrong_type", r"completion is null"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "equal_pair", r"the same as chosen"),
    (
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"},
        "wrong_type",
        r"margin is text, a number",
    ),
    ("preference", {"chosen": [ANSWER], "rejected": [USER]}, "wrong_type", r"a common prompt expected"),
    ("feedback", {"prompt": "p", "completion": "c", "label": "yes"}, "wrong_type", r"label is text, true or false"),
    ("classification", {"text": "t", "label": None}, "wrong_type", r"label is null"),
    ("text", {"text": ""}, "empty_message", r"text is empty"),
    ("prompts", {"prompt": [USER, ANSWER]}, "wrong_type", r"ends with an assistant message"),
]


@pytest.mark.parametrize(("data_format", "row", "code", "message"), FAULTY)
def test_a_faulty_row_is_told_with_field_and_expectation(
    data_format: Any, row: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(RowProblem, match=message) as caught:
        parse_row(row, data_format, {})
    assert caught.value.code == code


def test_a_row_that_is_no_object() -> None:
    with pytest.raises(RowProblem, match="row is a list, an object expected"):
        parse_row([1], "text", {})

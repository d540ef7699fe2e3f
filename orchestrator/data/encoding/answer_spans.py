"""Which characters of a rendered conversation are trained: every answer from the end of its prompt to its turn end.

Four methods, the exact ones first; each result is verified against the text before it is used:
1. the template's own `{% generation %}` marks, if there is one for every answer;
2. the rendered prompt of an answer (with the generation prompt) is a prefix of the whole text: the answer starts there;
3. the text before the answer's turn is a prefix: the answer starts where the generation prompt and the text diverge;
4. the answer's content is rendered between marks: it starts there, less what the template puts before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data.encoding.chat_template import (
    CONTENT_END,
    CONTENT_START,
    MARKS,
    ChatTemplate,
    Spans,
    TemplateRefused,
    take_marks,
)
from orchestrator.data.encoding.turn_markers import Turns
from orchestrator.data.formats.examples import Chat, Message


class NotRendered(Exception):
    """A conversation cannot be rendered or its answers cannot be found; `code` names the fault."""

    def __init__(self, field: str, message: str, *, code: str) -> None:
        self.field, self.code = field, code
        super().__init__(f"{field} {message}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, its trained character spans (ascending, disjoint), whether each ends with a turn end."""

    text: str
    spans: tuple[tuple[int, int], ...]
    num_open_ends: int
    """Trained answers that no special token closes."""


def render_chat(chat: Chat, template: ChatTemplate, turns: Turns) -> Rendered:
    """Render a conversation and find what is trained. Raises NotRendered if that cannot be said for certain."""
    _refuse_marks(chat)
    try:
        text, marked = template.render_with_marks(chat.messages, chat.tools, add_generation_prompt=False)
    except TemplateRefused as refusal:
        raise NotRendered(
            "messages", f"are refused by the chat template: {refusal}", code="template_refused"
        ) from refusal
    spans: list[tuple[int, int]] = []
    num_open = 0
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    by_marks = len(marked) == len(answers)  # otherwise the marks cannot be matched with answers
    for index, i in enumerate(answers):
        if not chat.trained[i]:
            continue
        if by_marks:
            start, end, closed = _close(text, marked[index], turns)
            _prove(chat.messages[i], i, text[start:end])
        else:
            start, end, closed = _find_answer(chat, i, text, template, turns)
        num_open += not closed
        spans.append((start, end))
    return Rendered(text, tuple(_joined(spans)), num_open)


def _joined(spans: Spans) -> Spans:
    """Ascending spans without overlap (consecutive answers may share a boundary)."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _refuse_marks(chat: Chat) -> None:
    for i, message in enumerate(chat.messages):
        content = message["content"]
        if any(mark in content for mark in MARKS):
            raise NotRendered(
                f"messages[{i}].content", "holds a Unicode noncharacter (U+FDD0..U+FDD3)", code="bad_text"
            )


def _close(text: str, span: tuple[int, int], turns: Turns) -> tuple[int, int, bool]:
    """A marked span with the turn end that follows it; without text given to the model or after the turn end."""
    start, end = span
    if text.startswith(turns.given, start):
        start += len(turns.given)
    inside = text[start:end].rstrip()
    if any(inside.endswith(token) for token in turns.ends):
        return start, start + len(inside), True
    rest = text[end:]
    gap = len(rest) - len(rest.lstrip())
    for token in turns.ends:
        if rest.startswith(token, gap):
            return start, end + gap + len(token), True
    return start, end, False


def _find_answer(chat: Chat, i: int, text: str, template: ChatTemplate, turns: Turns) -> tuple[int, int, bool]:
    """(start, end, whether a special token closes it) of answer i in the rendered text."""
    start = _start_by_prompt(chat, i, text, template)
    if start is None:
        start = _start_by_content(chat, i, text, template, turns)
    if start is None:
        raise NotRendered(
            f"messages[{i}]",
            "cannot be located with certainty in the rendered conversation: give a template with {% generation %} marks (chat_template=FILE)",
            code="lost_answer",
        )
    end = _turn_end(chat, i, text, start, template, turns)
    _prove(chat.messages[i], i, text[start : end[0]])
    return start, *end


def _start_by_prompt(chat: Chat, i: int, text: str, template: ChatTemplate) -> int | None:
    """Start of answer i, from the prompt that a model would be given for it; None if the text does not agree."""
    before = chat.messages[:i]
    if not before:
        return None
    try:
        prompt = template.render(before, chat.tools, add_generation_prompt=True)
    except TemplateRefused:
        return None
    if text.startswith(prompt):
        return len(prompt)
    try:
        history = template.render(before, chat.tools, add_generation_prompt=False)
    except TemplateRefused:
        return None
    if not text.startswith(history) or not prompt.startswith(history):
        return None
    header, rest = prompt[len(history) :], text[len(history) :]
    shared = next(
        (k for k, (a, b) in enumerate(zip(header, rest, strict=False)) if a != b), min(len(header), len(rest))
    )
    line_end = header.rfind("\n", 0, shared) + 1
    return len(history) + line_end if line_end else None


def _start_by_content(chat: Chat, i: int, text: str, template: ChatTemplate, turns: Turns) -> int | None:
    """Start of answer i, by rendering its content between marks; None if the marks change the text.

    First the whole content is marked; if the template trims it, the content without surrounding whitespace.
    """
    content: str = chat.messages[i]["content"]
    core = content.strip()
    if not core:
        return None
    lead, _, tail = content.partition(core)
    for marked in (f"{CONTENT_START}{content}{CONTENT_END}", f"{lead}{CONTENT_START}{core}{CONTENT_END}{tail}"):
        messages = (*chat.messages[:i], dict(chat.messages[i], content=marked), *chat.messages[i + 1 :])
        try:
            rendered = template.render(messages, chat.tools, add_generation_prompt=False)
        except TemplateRefused:
            continue
        clean, spans = take_marks(rendered, CONTENT_START, CONTENT_END)
        if clean == text and len(spans) == 1:
            start = spans[0][0]
            return start - len(turns.before) if text[:start].endswith(turns.before) else start
    return None


def _turn_end(chat: Chat, i: int, text: str, start: int, template: ChatTemplate, turns: Turns) -> tuple[int, bool]:
    """End of the turn that starts at `start` (with its closing token), and whether a special token closes it."""
    message = chat.messages[i]
    own = _own_texts(message)
    skip = sum(part.count(token) for part in own for token in turns.ends)
    position = start
    while True:
        found = [(where, token) for token in turns.ends if (where := text.find(token, position)) >= 0]
        if not found:
            break
        where, token = min(found)
        position = where + len(token)
        if not skip:
            return position, True
        skip -= 1
    return _open_end(chat, i, text, start, template), False


def _own_texts(message: Message) -> list[str]:
    """Every text that a message contributes to the conversation."""
    texts: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk({key: value for key, value in message.items() if key in ("content", "tool_calls")})
    return texts


def _open_end(chat: Chat, i: int, text: str, start: int, template: ChatTemplate) -> int:
    """The end of a turn that no special token closes: where the text of the conversation up to it ends."""
    if i + 1 == len(chat.messages):
        return len(text)
    try:
        until = template.render(chat.messages[: i + 1], chat.tools, add_generation_prompt=False)
    except TemplateRefused:
        until = ""
    if len(until) > start and text.startswith(until):
        return len(until)
    raise NotRendered(
        f"messages[{i}]",
        "has no definite end: the chat template closes it without a special token",
        code="lost_answer",
    )


def _prove(message: Message, i: int, found: str) -> None:
    """Raise if the found text lacks the answer's last words or the names of its tool calls."""
    content: str = message["content"]
    names = [call["function"]["name"] for call in message.get("tool_calls", [])]
    if content.strip()[-48:] in found and all(name in found for name in names):
        return
    raise NotRendered(f"messages[{i}]", "is not what the chat template renders as this answer", code="lost_answer")


def only_last(chat: Chat) -> Chat:
    """The conversation with only its last trained answer."""
    last = max((i for i, trained in enumerate(chat.trained) if trained), default=-1)
    return replace(chat, trained=tuple(i == last for i in range(len(chat.trained))))

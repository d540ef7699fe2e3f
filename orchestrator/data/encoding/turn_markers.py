"""What a chat template puts around an answer, found by rendering a probe; must not import torch or transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.data.encoding.chat_template import ChatTemplate, TemplateRefused
from orchestrator.data.formats.examples import Message

_QUESTION, _ANSWER = "Qjxz", "Ajxz"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a template puts around an answer, found by rendering a probe."""

    ends: tuple[str, ...]
    """The special tokens that close an answer; empty if the template uses none."""
    before: str
    """Text between the generation prompt and the content, such as a space."""
    given: str
    """Text inside the template's own marks that the generation prompt already contains, hence is given to the model."""
    refused: str | None
    """Why the template rejects the simplest conversation, or None."""


def learn_turns(template: ChatTemplate, special_texts: Sequence[str]) -> Turns:
    """Render a probe conversation and read the text around its answers."""
    user, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    try:
        single, marked = template.render_with_marks([user, answer], None, add_generation_prompt=False)
        prompt = template.render([user], None, add_generation_prompt=True)
    except TemplateRefused as refusal:
        return Turns((), "", "", str(refusal))
    tails = [single.rpartition(_ANSWER)[2]]
    try:
        double = template.render([user, answer, user, answer], None, add_generation_prompt=False)
        tails.append(double.split(_ANSWER)[1].split(_QUESTION)[0])
    except (TemplateRefused, IndexError):
        pass  # templates for a single turn
    longest_first = sorted(special_texts, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(text) for text in longest_first) or "(?!)")
    ends = [match.group() for tail in tails if (match := pattern.search(tail))]
    called = pattern.findall(_tool_call_tail(template, user))
    if called and not set(called) & set(ends):  # tool calls are closed by a token of their own
        ends.append(called[-1])
    continues = single.startswith(prompt)
    before = single[len(prompt) : single.rfind(_ANSWER)] if continues else ""
    given = _shared_start(prompt, single, marked[-1][0]) if marked else ""
    return Turns(tuple(dict.fromkeys(ends)), before, given, None)


def _shared_start(prompt: str, text: str, start: int) -> str:
    """The common prefix of `prompt` and `text` from `start` on, if they are the same before."""
    if prompt[:start] != text[:start]:
        return ""
    until = next(
        (k for k in range(start, min(len(prompt), len(text))) if prompt[k] != text[k]), min(len(prompt), len(text))
    )
    return text[start:until]


def _tool_call_tail(template: ChatTemplate, user: Message) -> str:
    """What follows a tool call's arguments, if the template supports tool calls."""
    call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "f", "arguments": {"x": _ANSWER}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        text = template.render([user, message], None, add_generation_prompt=False)
    except TemplateRefused:
        return ""
    return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""

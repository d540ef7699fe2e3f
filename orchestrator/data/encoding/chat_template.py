"""Chat templates, rendered in a sandbox with `{% generation %}` spans; must not import torch or transformers.

The environment is the one that transformers documents for chat templates (filters, globals, whitespace rules); tests
check that both render the same text. It is rebuilt here to fix the date, and as importing transformers costs a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import Any, ClassVar

from orchestrator.errors import DataError

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'Assistant:' }}{% generation %}{{ ' ' + message.content + eos_token }}"
    "{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Default template: `User: ...`, newline, `Assistant: ...` and the end-of-text token. Documented in docs/data.md."""

# Unicode noncharacters: never part of text, so they can mark positions in it.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
CONTENT_START, CONTENT_END = "\ufdd2", "\ufdd3"
MARKS = (MARK_START, MARK_END, CONTENT_START, CONTENT_END)

Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text, the special tokens and the date that are passed to it."""

    source: str
    variables: tuple[tuple[str, str], ...]
    today: str

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation. Raises TemplateRefused with the template's own message."""
        return self.render_with_marks(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_with_marks(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> tuple[str, Spans]:
        """The text, and the character spans between `{% generation %}` marks."""
        import jinja2

        template = _compile(self.source, self.today)
        try:
            text = template.render(
                messages=messages,
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **dict(self.variables),
            )
        except jinja2.TemplateError as error:
            raise TemplateRefused(error.message or type(error).__name__) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateRefused(f"{type(error).__name__}: {error}") from error
        return take_marks(text, MARK_START, MARK_END)


class TemplateRefused(Exception):
    """The template rejects a conversation (for example roles in a wrong order)."""


def take_marks(text: str, start_mark: str, end_mark: str) -> tuple[str, Spans]:
    """The text without the marks, and the spans that were between them."""
    if start_mark not in text:
        return text, []
    parts, spans, length = [], [], 0
    for i, piece in enumerate(text.split(start_mark)):
        inside, found, after = piece.partition(end_mark) if i else ("", "", piece)
        if i and found:
            spans.append((length, length + len(inside)))
        parts += [inside, after]
        length += len(inside) + len(after)
    return "".join(parts), spans


@lru_cache(maxsize=8)
def _compile(source: str, today: str) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(Extension):
        """`{% generation %} ... {% endgeneration %}` puts marks around its content."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{MARK_START}{caller()}{MARK_END}"

    # A template comes with a foreign model: it is code, and runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    # A fixed date: the prepared rows must not change from day to day.
    environment.globals["strftime_now"] = datetime.fromisoformat(today).strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"The chat template is not valid Jinja: line {error.lineno}: {error.message}") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def check_date(value: str) -> date:
    """Parse a `template_date` value; raises DataError."""
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        raise DataError(f"template_date={value} is not a date: YYYY-MM-DD expected") from error

"""Functions that users bring to a stage: metrics of held-out answers, callbacks; no torch."""

from __future__ import annotations

from pydantic import Field

from orchestrator.config.base import PositiveInt, Section, Text


class FunctionSource(Section):
    """A function and its keyword arguments."""

    source: Text
    """`FILE.py:function`; a relative path starts at the working folder of the command."""
    # The one kind of default that stands in Python: items of a list have no file in conf/ to take it from.
    options: dict[str, bool | int | float | str] = Field(default_factory=dict[str, bool | int | float | str])
    """Keyword arguments of the function."""


class MetricsConfig(Section):
    """A user's own measures of what the model answers to held-out rows."""

    functions: tuple[FunctionSource, ...]
    """`function(samples, ...)` -> a number, or a dict of numbers; each becomes a column of metrics.jsonl, `eval_NAME`."""
    rows: PositiveInt
    """Held-out rows answered for the functions, the first ones, at every evaluation."""
    max_new_tokens: PositiveInt
    """Longest answer; answers are greedy."""

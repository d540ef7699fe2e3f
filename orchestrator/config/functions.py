"""A user's own functions in a stage: metrics of held-out answers, callbacks. Must not import torch."""

from __future__ import annotations

from pydantic import Field

from orchestrator.config.base import PositiveInt, Section, Text


class FunctionSource(Section):
    """A function and its keyword arguments."""

    source: Text
    """`FILE.py:function`; a relative path is resolved against the command's working folder."""
    # The one kind of default set in Python: items of a list have no file in conf/ to take it from.
    options: dict[str, bool | int | float | str] = Field(default_factory=dict[str, bool | int | float | str])
    """Keyword arguments of the function."""


class MetricsConfig(Section):
    """A user's own metrics of the model's answers to held-out rows."""

    functions: tuple[FunctionSource, ...]
    """`function(samples, ...)` -> a number, or a dict of numbers; each becomes a column of metrics.jsonl, `eval_NAME`."""
    rows: PositiveInt
    """Held-out rows (the first ones) that the model answers for the functions at every evaluation."""
    max_new_tokens: PositiveInt
    """Longest answer, decoded greedily."""

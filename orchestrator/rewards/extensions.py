"""User metrics and callbacks given as `FILE.py:function`: checked without running them, and loaded.

Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias, cast

from orchestrator.errors import ConfigError
from orchestrator.rewards.builtin import Sample
from orchestrator.rewards.python_file import Form, error_text, load_function

METRIC = Form(what="metric", inputs=(("samples",),))
CALLBACK = Form(what="callback", inputs=(("event", "values"),))
STOP = "stop"
"""Return value of a callback that makes the stage save and end."""

Metric: TypeAlias = Callable[[Sequence[Sample]], Mapping[str, float]]
Callback: TypeAlias = Callable[[str, Mapping[str, Any]], bool]
"""(event, values) -> whether the stage is to save and end."""


def load_metric(name: str, options: Mapping[str, Any]) -> Metric:
    """Numbers by column name; ConfigError if the function fails or returns anything but finite numbers."""
    found = load_function(name, options, METRIC)
    short = name.rpartition(":")[2]

    def metric(samples: Sequence[Sample]) -> Mapping[str, float]:
        try:
            value: object = found.function(samples=samples)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"metric {name} failed: {error_text(error, found.path)}") from error
        columns = cast("Mapping[object, object]", value) if isinstance(value, Mapping) else {short: value}
        return {_column(name, key): _number(name, number) for key, number in columns.items()}

    return metric


def load_callback(name: str, options: Mapping[str, Any]) -> Callback:
    """Call the user's function; ConfigError if it fails, or returns anything but None or "stop"."""
    found = load_function(name, options, CALLBACK)

    def callback(event: str, values: Mapping[str, Any]) -> bool:
        try:
            answer: object = found.function(event=event, values=dict(values))
        except (Exception, SystemExit) as error:
            raise ConfigError(f"callback {name} failed at {event}: {error_text(error, found.path)}") from error
        if answer not in (None, STOP):
            raise ConfigError(f'callback {name} returned {answer!r} at {event}; allowed is nothing or "{STOP}"')
        return answer == STOP

    return callback


def _column(name: str, key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ConfigError(f"metric {name} returned the key {key!r}; allowed are names, such as {{'f1': 0.5}}")
    return key


def _number(name: str, value: object) -> float:
    # numpy's scalars register as Real; torch's do not, and a tensor left on a GPU would block here.
    if not isinstance(value, Real) or not math.isfinite(value):
        said = f"{repr(value)[:80]} ({type(value).__name__})"
        raise ConfigError(f"metric {name} returned {said}; allowed is a finite number, or a dict of them")
    return float(value)

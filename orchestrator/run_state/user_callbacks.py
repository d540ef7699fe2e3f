"""A user's own callbacks: called on the first rank with every event and row of metrics. Must not depend on the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.config.functions import FunctionSource
from orchestrator.errors import ConfigError
from orchestrator.rewards.extensions import Callback, load_callback


class Callbacks:
    """Owns the callbacks of a stage; one that fails is reported and not called again."""

    def __init__(
        self, sources: Sequence[FunctionSource], *, ask_to_stop: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        """Load the functions; ConfigError if one cannot be loaded, since that shows before the first step and is worth
        stopping for.
        """
        self._functions: dict[str, Callback] = {
            source.source: load_callback(source.source, source.options) for source in sources
        }
        self._ask_to_stop, self._warn = ask_to_stop, warn

    def call(self, event: str, values: Mapping[str, Any]) -> None:
        """Pass an event on. A failing callback never stops training: like W&B, it is not essential."""
        for name, function in list(self._functions.items()):
            try:
                wants_stop = function(event, values)
            except ConfigError as error:
                self._warn(f"{error}; it is not called again in this attempt")
                del self._functions[name]
                continue
            if wants_stop:
                # Only this rank's request: the ranks agree on it at the next step boundary, and all save there.
                self._ask_to_stop(f"callback {name} asked for it at {event}")

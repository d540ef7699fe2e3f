"""Lists of node counts among the overrides: `cluster.nodes=1,2,...,16`. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import ConfigError

KEY = "cluster.nodes="


ELLIPSIS = "..."


def take_node_counts(arguments: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """The overrides without `cluster.nodes=1,2,4,...,512`, and its numbers; None if there is no such list.

    Three dots continue with the ratio of the two numbers before them.
    """
    lists = [
        override for override in arguments if override.startswith(KEY) and "," in override and "-m" not in arguments
    ]
    if not lists or "--multirun" in arguments:
        return list(arguments), None
    counts = _expanded(lists[-1].removeprefix(KEY).split(","), override=lists[-1])
    return [override for override in arguments if override not in lists], counts


def _expanded(parts: Sequence[str], *, override: str) -> list[int]:
    counts: list[int] = []
    for index, part in enumerate(parts):
        if part.strip() == ELLIPSIS and 2 <= index < len(parts) - 1:
            counts += _between(counts, _count(parts[index + 1], override), override)
        else:
            counts.append(_count(part, override))
    return counts


def _between(counts: Sequence[int], last: int, override: str) -> list[int]:
    """The numbers that the three dots expand to."""
    factor, rest = divmod(counts[-1], counts[-2])
    if rest or factor < 2:
        raise ConfigError(
            f"{override}: three dots continue by the ratio of the two numbers before them; type 1,2,4,...,512"
        )
    found: list[int] = []
    while (following := (found or counts)[-1] * factor) < last:
        found.append(following)
    return found


def _count(text: str, override: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(f"{override}: {text or 'nothing'} is not a number of nodes; type {KEY}1,2,4,...,512")
    return int(text)

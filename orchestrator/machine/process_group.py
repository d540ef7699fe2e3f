"""Variables by which a launcher tells a process its rank: a process that is no rank must not see them. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping

NAMES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"}
)
PREFIX = "TORCHELASTIC_"


def rank_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of such variables that are set."""
    return sorted(name for name in environment if name in NAMES or name.startswith(PREFIX))

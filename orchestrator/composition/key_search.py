"""Finds keys of the reference by part of their name, a glob or a configuration's own key. Must not import torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from itertools import pairwise

from orchestrator.composition.key_reference import MAP_NAMES, Key


def matching(keys: Sequence[Key], pattern: str) -> list[Key]:
    """Keys whose name contains the text or matches the glob; the name of a stage, as other verbs print it, counts as
    STAGE.
    """
    return _matching(keys, pattern) or _matching(keys, _with_placeholders(pattern))


def _with_placeholders(pattern: str) -> str:
    """A configuration's own key as the reference spells it: `stages.sft.data.mix.1.path` ->
    `stages.STAGE.data.mix.0.path`.
    """
    parts = pattern.split(".")
    for index, (above, part) in enumerate(pairwise(parts), start=1):
        if part.isdecimal():
            parts[index] = "0"
        else:
            # The first part may be `optimizer@stages`.
            parts[index] = MAP_NAMES.get(above.rpartition("@")[2], part)
    return ".".join(parts)


def _matching(keys: Sequence[Key], pattern: str) -> list[Key]:
    wanted = pattern.lower()
    if any(sign in wanted for sign in "*?["):
        return [key for key in keys if fnmatch.fnmatchcase(key.name.lower(), wanted)]
    return [key for key in keys if wanted in key.name.lower()]

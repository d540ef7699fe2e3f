"""Keys that take `auto`, which no type of the configuration holds: it is resolved before the types judge. Must not import torch."""

from __future__ import annotations

import re

AUTO = "auto"
NUMBER_TYPE = "model.dtype"
"""Resolved from the device of the ranks (`number_type.py`)."""
STAGE = "STAGE"
"""Stands for any stage."""
SMALLEST: dict[str, object] = {
    "sharding.strategy": "none",
    "model.gradient_checkpointing": False,
    f"stages.{STAGE}.batch.micro_size": 1,
}
"""Key that `plan` settles -> the value in the place of its `auto` until then."""


def takes_auto(key: str) -> bool:
    """Whether `key=auto` is resolved; a key of a stage may have the stage's name or STAGE in it."""
    plain = re.sub(r"^stages\.[^.]+", f"stages.{STAGE}", key)
    return plain in (*SMALLEST, NUMBER_TYPE)

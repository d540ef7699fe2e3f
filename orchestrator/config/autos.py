"""Keys that accept `auto`. No type of the configuration has that value, so it is resolved before validation.

Must not import torch.
"""

from __future__ import annotations

import re

AUTO = "auto"
NUMBER_TYPE = "model.dtype"
"""Resolved from the device of the ranks (`number_type.py`)."""
STAGE = "STAGE"
"""Matches any stage."""
SMALLEST: dict[str, object] = {
    "sharding.strategy": "none",
    "model.gradient_checkpointing": False,
    f"stages.{STAGE}.batch.micro_size": 1,
}
"""Key that `plan` settles -> the value that replaces its `auto` until then."""


def takes_auto(key: str) -> bool:
    """Whether `key=auto` is resolved; the key of a stage may contain the stage's name or STAGE."""
    plain = re.sub(r"^stages\.[^.]+", f"stages.{STAGE}", key)
    return plain in (*SMALLEST, NUMBER_TYPE)

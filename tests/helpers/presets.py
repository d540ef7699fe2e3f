"""The architectures of the presets."""

from __future__ import annotations

import yaml

from orchestrator.composition.compose import CONF
from orchestrator.config.model import Architecture


def preset(name: str) -> Architecture:
    return Architecture.model_validate(
        yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["preset"]["architecture"]
    )

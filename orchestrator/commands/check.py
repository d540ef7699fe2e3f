"""The verb check. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.commands.plan_from_overrides import planned_run
from orchestrator.commands.preflight_process import run_preflight
from orchestrator.planning.inspect_inputs import validate_data

if TYPE_CHECKING:
    pass


def check(arguments: Sequence[str]) -> int:
    """Inspect everything before compute is spent: configuration, base, every row, masks, one tiny backward pass. Writes
    no run folder.
    """
    config, _ = planned_run(arguments)
    validate_data(config)
    return run_preflight("check", config, {"HF_HUB_OFFLINE": "1"})

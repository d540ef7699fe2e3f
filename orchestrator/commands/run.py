"""The verb run. Must not import torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.commands.plan_from_overrides import first_config, planned_run, planned_runs
from orchestrator.composition.multirun import is_sweep
from orchestrator.config.study import NoStudy
from orchestrator.errors import ConfigError
from orchestrator.planning.plan_fit import refuse_unprovable

if TYPE_CHECKING:
    from orchestrator.execution.run_pipeline import StageSelection


def run(arguments: Sequence[str], *, part: StageSelection) -> int:
    """Check, plan and launch; continue unfinished stages and skip finished ones. With -m, one run per combination."""
    from orchestrator.execution.run_pipeline import ALL_STAGES, execute, execute_all

    began = time.time()
    if is_sweep(arguments):
        config = first_config(arguments)
        if isinstance(config.study, NoStudy):
            runs = planned_runs(arguments)
            for _, planned in runs:
                refuse_unprovable(planned)
            return execute_all(runs)
    else:
        config, planned = planned_run(arguments)
        refuse_unprovable(planned)
        if isinstance(config.study, NoStudy):
            return execute(config, planned, part=part, began=began)
    from orchestrator.studies.run_study import run_study

    if part != ALL_STAGES:
        raise ConfigError("--from and --only: a study runs whole pipelines; leave them out, or type study=none")
    return run_study(arguments, config, planned_run)

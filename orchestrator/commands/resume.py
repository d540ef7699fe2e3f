"""The verb resume. Must not import torch."""

from __future__ import annotations

import time

from orchestrator.config.rules import rule_problems
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.machine.dtype import settle_folder
from orchestrator.machine.this_machine import this_machine
from orchestrator.metrics.phases import LOOKING
from orchestrator.metrics.screen import busy
from orchestrator.planning.host_hardware import as_seen
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.lost_inputs import lost_inputs
from orchestrator.planning.plan import make_plan
from orchestrator.planning.processor_speed import with_speeds
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.freeze import check_writable
from orchestrator.run_state.frozen import load_config, refuse_newer
from orchestrator.run_state.reuse import up_to_date_stages


def resume(folder: RunFolder) -> int:
    """Continue a run from its folder alone."""
    from orchestrator.execution.run_pipeline import execute

    began = time.time()
    config = load_config(folder)
    refuse_newer(folder)
    problems = rule_problems(config)
    if problems:
        raise ConfigError(problems)
    done = up_to_date_stages(config, folder)
    if len(done) == len(config.pipeline):  # this needs neither data nor base nor write permission
        print("\n".join(f"{stage}: done already; its result is {folder.stage(stage).result}" for stage in done))
        return EXIT_DONE
    lost = lost_inputs(config, folder, [name for name in config.pipeline if name not in done])
    if lost:
        raise ConfigError(lost)
    check_writable(folder.root, advice="copy the run folder to a disk of yours and resume the copy")
    with busy(LOOKING):
        machine = this_machine(config.cluster.environment)
        seen = as_seen(config, machine, None)
        base, data = inspect_inputs(seen)
        data = with_speeds(seen, machine, base, data, may_measure=False)
    planned = make_plan(seen, base=base, data=data, number_type=settle_folder(config, folder, machine))
    return execute(config, planned, began=began)

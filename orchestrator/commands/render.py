"""The verb render. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.commands.plan_from_overrides import plans_of
from orchestrator.config.study import NoStudy
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.execution.job_specs import render_scripts


def render(arguments: Sequence[str]) -> int:
    """Write the scripts into the run folder and print them; submit nothing."""
    from orchestrator.execution.run_pipeline import freeze_run

    for config, planned in plans_of(arguments):
        if not isinstance(config.study, NoStudy):
            raise ConfigError(
                f"study={config.study.kind}: render writes the scripts of one run; leave out study=, and -m or the seeds of one trial"
            )
        scripts = render_scripts(config)
        freeze_run(config, planned, scripts)
        for script in scripts:
            print(f"# {script.path}")
            print(script.text)
    return EXIT_DONE

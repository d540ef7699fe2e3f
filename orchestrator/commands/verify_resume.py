"""The verb verify-resume. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from launchers.process import launch
from orchestrator.commands.plan_from_overrides import planned_run
from orchestrator.config.run import RunConfig
from orchestrator.errors import EXIT_DEFECT, EXIT_DONE
from orchestrator.execution.job_specs import job_spec, render
from orchestrator.execution.resume_proof import Running, print_proof
from orchestrator.execution.resume_proof import verify_resume as prove_resume
from orchestrator.execution.run_pipeline import freeze_run
from orchestrator.planning.inspect_inputs import inspect_inputs, validate_data
from orchestrator.planning.plan import make_plan


def verify_resume(arguments: Sequence[str], *, steps: int) -> int:
    """Train a few steps uninterrupted, and again with a kill in between; compare every step and tensor."""
    config, _ = planned_run(arguments)
    validate_data(config)
    proof = prove_resume(config, steps=steps, start=_start, say=print)
    print_proof(proof)
    return EXIT_DONE if proof.first_difference is None else EXIT_DEFECT


def _start(config: RunConfig, stage: str) -> AbstractContextManager[Running]:
    base, data = inspect_inputs(config)
    script = render(config, stage)
    freeze_run(config, make_plan(config, base=base, data=data), [script])
    return launch(script, job_spec(config, stage))

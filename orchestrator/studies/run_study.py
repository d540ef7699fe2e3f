"""Starts and describes a study: the one that the overrides ask for, its plan, its run and its report.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.composition.multirun import is_sweep
from orchestrator.config.run import RunConfig
from orchestrator.config.study import NoStudy, SeedsStudy
from orchestrator.errors import EXIT_SAVED, ConfigError
from orchestrator.planning.records import Plan
from orchestrator.studies.report import write_report
from orchestrator.studies.search_space import split_space
from orchestrator.studies.seed_grid import PlanRun, run_seeds
from orchestrator.studies.trials import study_folder


def run_study(overrides: Sequence[str], config: RunConfig, plan_run: PlanRun) -> int:
    """Run the rest of the study and report the results so far; return the exit code."""
    if isinstance(config.study, SeedsStudy) and is_sweep(overrides):
        raise ConfigError("study=seeds makes its own runs; leave out -m, and run it once for each other value")
    folder = study_folder(config)
    try:
        code = _run(overrides, config, plan_run)
    except KeyboardInterrupt:  # between two trials, or before a trial's display existed; its job has been ended
        if not folder.record.exists():
            raise
        code = EXIT_SAVED
    print(write_report(folder))
    if config.launcher.kind == "slurm":
        print(f"when the jobs have ended: python -m orchestrator report {folder.root}")
    elif code == EXIT_SAVED:
        print("the same command continues the study from here")
    return code


def _run(overrides: Sequence[str], config: RunConfig, plan_run: PlanRun) -> int:
    if isinstance(config.study, SeedsStudy):
        return run_seeds(overrides, config, plan_run)
    from orchestrator.studies.optuna_search import run_search

    return run_search(overrides, config, plan_run)


def space_problems(overrides: Sequence[str]) -> list[str]:
    """Problems of the space of a search, if the overrides ask for one."""
    if "study=optuna" not in overrides:
        return []
    try:
        split_space(overrides)
    except ConfigError as error:
        return list(error.problems)
    return []


def outlook(config: RunConfig, planned: Plan) -> list[str]:
    """The study's additions to the plan of one of its runs."""
    study = config.study
    if isinstance(study, NoStudy):
        return []
    hours = [None if stage.time is None else stage.time.hours for stage in planned.stages]
    known = [hour for hour in hours if hour is not None]
    trials = len(study.weights) * len(study.data) if isinstance(study, SeedsStudy) else study.num_trials
    how = (
        f"{len(study.weights)} seeds of new weights x {len(study.data)} of the data order"
        if isinstance(study, SeedsStudy)
        else f"searched by {study.sampler}; above with the first values of its space"
    )
    time = (
        f"; {trials} x {sum(known):.2f} h = {trials * sum(known):.2f} h one after the other"
        if len(known) == len(hours)
        else ""
    )
    early = study.stopping if isinstance(study, SeedsStudy) else study.pruning
    less = "" if early is None else ", minus what stopping weak trials saves"
    return [f"study {study.kind}: {trials} such runs ({how}){time}{less}; report in {study_folder(config).root}"]

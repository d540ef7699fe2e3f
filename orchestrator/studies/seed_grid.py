"""The study of seeds: every seed of new weights with every seed of the data order, weak trials stopped on request.

Must not import torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig, training_pipeline
from orchestrator.config.study import SeedsStudy, WeakRule, pause_problems
from orchestrator.errors import EXIT_DONE, EXIT_SAVED, ConfigError, LaunchFailed, OrchestratorError
from orchestrator.execution.run_pipeline import execute, execute_all
from orchestrator.planning.records import Plan
from orchestrator.studies.statistics import best_first
from orchestrator.studies.trials import (
    Standing,
    StudyFolder,
    Trial,
    as_trial,
    freeze_study,
    metric_watch,
    standing_of,
    studied_stage,
)

PlanRun = Callable[[Sequence[str]], tuple[RunConfig, Plan]]
"""Configuration and plan of overrides; ConfigError with every problem."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The comparison of trials at the common step."""

    step: int
    kept: tuple[str, ...]
    """Trials that continue, the best first."""
    weak: tuple[str, ...]
    """Trials that were stopped, the best first."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The trials of a study, ready to run."""

    folder: StudyFolder
    stage: str
    study: SeedsStudy
    runs: Mapping[str, tuple[RunConfig, Plan]]
    step: int | None
    """Step at which they are compared; None if none is stopped."""

    def standing(self, name: str) -> Standing:
        return standing_of(self.folder.trial(name), self.stage, self.study.metric)


def seed_trials(name: str, study: SeedsStudy) -> list[Trial]:
    """One trial per cell, the data seed changing fastest."""
    return [
        Trial(
            name=f"{name}-weights_{weights}-data_{data}",
            values={"seeds.weights": str(weights), "seeds.data": str(data)},
        )
        for weights in study.weights
        for data in study.data
    ]


def judging_step(rule: WeakRule, steps: int | None, *, stage: str) -> int:
    """The optimizer step at which all are compared; ConfigError if there is none before the end."""
    if steps is None:
        raise ConfigError(
            f"study.stopping: the steps of {stage} are known only when its data is prepared; type stages.{stage}.max_steps=N"
        )
    step = math.ceil(rule.share * steps)
    if step >= steps:
        raise ConfigError(f"study.stopping.share: {rule.share:g} of {steps} steps, rounded up, is the end; give less")
    return step


def judge(values: Mapping[str, float], *, step: int, keep: int, mode: str) -> Judged:
    """The best `keep` trials by their value at the common step continue; ties go to those named first."""
    order = best_first(list(values.items()), mode="min" if mode == "min" else "max")
    return Judged(step=step, kept=tuple(order[:keep]), weak=tuple(order[keep:]))


def run_seeds(overrides: Sequence[str], config: RunConfig, plan_run: PlanRun) -> int:
    """Run the rest of every trial; return the exit code."""
    grid = _grid(overrides, config, plan_run)
    if config.launcher.kind == "slurm":
        return execute_all([(as_trial(run), planned) for run, planned in grid.runs.values()])
    if grid.step is None:
        return _run_each(grid, tuple(grid.runs))
    codes: dict[str, int] = {}
    for name in grid.runs:
        code = _to_the_judgement(grid, name)
        if code == EXIT_SAVED:
            return EXIT_SAVED
        codes |= {name: code} if code != EXIT_DONE else {}
    judged = judgement(grid.study, {name: grid.standing(name) for name in grid.runs}, step=grid.step)
    print(
        f"judged at step {judged.step}: {', '.join(judged.kept)} continue; stopped as weak: {', '.join(judged.weak) or 'none'}"
    )
    code = _run_each(grid, judged.kept)
    return next(iter(codes.values()), code) if code != EXIT_SAVED else code


def _run_each(grid: Grid, names: Sequence[str]) -> int:
    """Train trials to their ends. A failed trial does not stop the others; an interrupt does."""
    failure = EXIT_DONE
    for name in names:
        code = _run(grid, name, pause_at_step=None)
        if code == EXIT_SAVED:
            return code
        failure = failure or code
    return failure


def judgement(study: SeedsStudy, standings: Mapping[str, Standing], *, step: int) -> Judged:
    """The comparison by the evaluations at the common step; a trial without one is excluded."""
    assert study.stopping is not None
    values = {name: one.values[step] for name, one in standings.items() if step in one.values}
    return judge(values, step=step, keep=study.stopping.keep, mode=study.mode)


def _grid(overrides: Sequence[str], config: RunConfig, plan_run: PlanRun) -> Grid:
    study = config.study
    assert isinstance(study, SeedsStudy)
    trials = seed_trials(config.name, study)
    runs, problems = plan_trials([[*overrides, *trial.overrides] for trial in trials], plan_run)
    if problems:
        raise ConfigError(problems)
    stage = studied_stage(config)
    first_config, first_plan = runs[0]
    step = None
    if study.stopping is not None:
        steps = next(entry.steps for entry in first_plan.stages if entry.name == stage)
        step = judging_step(study.stopping, steps, stage=stage)
        paused = as_trial(first_config, pause_at_step=step)
        problems = pause_problems(training_pipeline(paused), launcher=config.launcher.kind)
        if problems:
            raise ConfigError(problems)
    listed: list[JsonValue] = [{"name": trial.name, "values": {**trial.values}} for trial in trials]
    folder = freeze_study(as_resolved(config, first_config), {"trials": listed, "judged_at_step": step})
    named = {trial.name: run for trial, run in zip(trials, runs, strict=True)}
    return Grid(folder=folder, stage=stage, study=study, runs=named, step=step)


def as_resolved(config: RunConfig, resolved: RunConfig) -> RunConfig:
    """The study's own configuration, with the absolute paths of a trial."""
    return resolved.model_copy(update={"name": config.name, "seed": config.seed, "seeds": config.seeds})


def plan_trials(runs: Sequence[Sequence[str]], plan_run: PlanRun) -> tuple[list[tuple[RunConfig, Plan]], list[str]]:
    """Every run that can be planned, and every problem once."""
    found: list[tuple[RunConfig, Plan]] = []
    problems: dict[str, None] = {}
    for overrides in runs:
        try:
            found.append(plan_run(overrides))
        except OrchestratorError as error:
            problems |= dict.fromkeys(error.problems)
    return found, list(problems)


def _to_the_judgement(grid: Grid, name: str) -> int:
    """Train a trial to the common step, unless it has reached it; EXIT_SAVED if it was interrupted before."""
    assert grid.step is not None
    if grid.step in grid.standing(name).values:
        return EXIT_DONE
    code = _run(grid, name, pause_at_step=grid.step)
    if grid.step in grid.standing(name).values:
        return EXIT_DONE
    if code == EXIT_DONE:
        raise ConfigError(f"{name}: it was done before, without an evaluation at step {grid.step}; type another name=")
    return code


def _run(grid: Grid, name: str, *, pause_at_step: int | None) -> int:
    config, planned = grid.runs[name]
    number = list(grid.runs).index(name) + 1
    print(f"trial {number} of {len(grid.runs)}: {name}", flush=True)
    try:
        return execute(as_trial(config, pause_at_step=pause_at_step), planned, watch=metric_watch(config))
    except LaunchFailed as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code

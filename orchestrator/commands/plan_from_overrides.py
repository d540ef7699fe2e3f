"""Composes and plans the runs that overrides ask for. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.spec import InvalidValueError
from orchestrator.architecture.zero_buckets import with_zero_buckets
from orchestrator.composition.compose import Composed, examine
from orchestrator.composition.multirun import FLAGS, combinations, first_overrides, is_sweep
from orchestrator.config.run import RunConfig
from orchestrator.config.study import NoStudy
from orchestrator.errors import (
    ConfigError,
    OrchestratorError,
)
from orchestrator.execution.job_specs import render as render_script
from orchestrator.machine.this_machine import this_machine
from orchestrator.metrics.phases import LOOKING
from orchestrator.metrics.screen import busy
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.host_hardware import as_seen
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.plan import make_plan
from orchestrator.planning.processor_speed import with_speeds
from orchestrator.planning.records import Plan

if TYPE_CHECKING:
    pass


def plans_of(arguments: Sequence[str], *, measures: bool = False) -> list[tuple[RunConfig, Plan]]:
    """Every run that the overrides ask for; of a search, whose values are chosen later, one with the first values."""
    if not is_sweep(arguments):
        return [planned_run(arguments, measures=measures)]
    is_study = not isinstance(first_config(arguments).study, NoStudy)
    if is_study:
        return [planned_run(first_overrides(arguments), measures=measures)]
    return planned_runs(arguments, measures=measures)


def first_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration of the first run of a multirun; ConfigError with every problem, including those of a search's
    space.
    """
    overrides, config_directory = take_config_directory([argument for argument in arguments if argument not in FLAGS])
    try:
        return compose_overrides(first_overrides(overrides), config_directory).config
    except ConfigError as error:
        from orchestrator.studies.run_study import space_problems

        raise ConfigError([*error.problems, *space_problems(overrides)]) from None


@busy(LOOKING)
def planned_run(arguments: Sequence[str], *, measures: bool = False) -> tuple[RunConfig, Plan]:
    """Configuration and plan; one error with every problem of overrides, keys, rules, base, data and scripts.

    `measures` lets the forecast time an unknown processor, which takes seconds; commands that start a job do not wait
    for it.
    """
    return _planned_run(arguments, measures=measures)


def _planned_run(arguments: Sequence[str], *, measures: bool) -> tuple[RunConfig, Plan]:
    overrides, config_directory = take_config_directory(arguments)
    composed = examine(overrides, config_directory=config_directory)
    if composed.autos and not composed.problems:
        from orchestrator.planning.auto_settings import resolve_auto_overrides

        kept = [argument for argument in overrides if argument != "sharding=auto"]
        composed = examine(
            [*kept, *resolve_auto_overrides(composed, config_directory)], config_directory=config_directory
        )
    config, problems = composed.config, composed.problems
    config = resolve(config, Path.cwd())
    machine = this_machine(config.cluster.environment)
    seen = as_seen(config, machine, config_directory)
    try:
        base, data = inspect_inputs(seen)
    except OrchestratorError as error:
        raise ConfigError([*problems, *error.problems, *_script_problems(config)]) from None
    problems += _script_problems(config)
    if problems:
        raise ConfigError(problems)
    data = with_speeds(seen, machine, base, data, may_measure=measures)
    planned = make_plan(seen, base=base, data=data, notes=composed.notes, number_type=composed.number_type)
    return with_zero_buckets(config, base.architecture), planned


def compose_overrides(overrides: Sequence[str], config_directory: Path | None) -> Composed:
    """The composed overrides; ConfigError with every problem."""
    composed = examine(overrides, config_directory=config_directory)
    if composed.problems:
        raise ConfigError(composed.problems)
    return composed


def planned_runs(arguments: Sequence[str], *, measures: bool = False) -> list[tuple[RunConfig, Plan]]:
    """Every run of a multirun; one error with the problems of all of them before anything is written."""
    overrides, config_directory = take_config_directory([argument for argument in arguments if argument not in FLAGS])
    first = examine(first_overrides(overrides), config_directory=config_directory)
    problems = first.problems
    if problems:
        raise ConfigError(problems)
    folder = [] if config_directory is None else ["--config-dir", str(config_directory)]
    found: list[tuple[RunConfig, Plan]] = []
    failures: dict[str, None] = {}
    with busy(LOOKING, unit="runs") as phases:
        for combination in combinations(overrides, name=first.config.name):
            try:
                found.append(_planned_run([*folder, *combination], measures=measures))
            except OrchestratorError as error:
                failures |= dict.fromkeys(error.problems)
            phases.advance(len(found), unit="runs")
    if failures:
        raise ConfigError(list(failures))
    return found


def _script_problems(config: RunConfig) -> list[str]:
    """Problems of the launcher's scripts, without duplicates."""
    problems: dict[str, None] = {}
    for stage in [name for name in config.pipeline if name in config.stages]:
        try:
            render_script(config, stage)
        except InvalidValueError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def take_config_directory(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    directory: Path | None = None
    overrides = iter(arguments)
    for argument in overrides:
        name, _, value = argument.partition("=")
        if name == "--config-dir":
            value = value or next(overrides, "")
            if not value or directory is not None:
                raise ConfigError("--config-dir: give one folder after it, and give it once")
            directory = Path(value).expanduser()
        elif argument.startswith("-"):
            raise ConfigError(f"{argument}: no such option")
        else:
            rest.append(argument)
    return rest, directory

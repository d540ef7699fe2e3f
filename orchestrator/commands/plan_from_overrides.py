"""The verbs that start from a configuration: plan, render, run, resume. Must not import torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launchers.spec import InvalidValueError
from orchestrator.architecture.zero_buckets import sized
from orchestrator.composition.compose import Composed, examine
from orchestrator.composition.multirun import FLAGS, combinations, first_words, is_sweep
from orchestrator.config.pipeline import fresh_stages
from orchestrator.config.rules import rule_problems
from orchestrator.config.run import RunConfig
from orchestrator.config.study import NoStudy
from orchestrator.display.plan_table import print_plan, print_plans, print_scaling
from orchestrator.errors import (
    EXIT_DONE,
    ConfigError,
    OrchestratorError,
)
from orchestrator.execution.job_specs import render as render_script
from orchestrator.execution.job_specs import render_scripts
from orchestrator.machine.dtype import settle_folder
from orchestrator.machine.this_machine import this_machine
from orchestrator.metrics.phases import LOOKING
from orchestrator.metrics.screen import busy
from orchestrator.planning.host_hardware import as_seen
from orchestrator.planning.inspect_inputs import gather
from orchestrator.planning.lost_inputs import lost_inputs
from orchestrator.planning.plan import Plan, make_plan, resolve
from orchestrator.planning.processor_speed import with_speeds
from orchestrator.planning.scaling import scaling_rows, take_node_counts
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.freeze import check_writable, refuse_inside_a_run
from orchestrator.run_state.frozen import load_config, refuse_newer

if TYPE_CHECKING:
    from orchestrator.execution.run_pipeline import Part

SHARED = (".batch: global_size", ".rollout.prompts:")
"""Rules on sharing rows among ranks: the scaling table tells them row by row."""


def plan(arguments: Sequence[str], *, advise: bool, as_json: bool, everything: bool = False) -> int:
    """Prints what would happen, or what else would fit, or a list of numbers of nodes side by side; writes nothing."""
    if advise:
        from orchestrator.planning.auto_settings import print_advice

        words, config_directory = _take_config_directory(arguments)
        print_advice(composed_words(words, config_directory), config_directory, as_json=as_json)
        return EXIT_DONE
    words, counts = take_node_counts(arguments)
    if counts is not None:
        return _scaling(words, counts, as_json=as_json)
    runs = _runs(words, measures=True)
    if not as_json and not everything and len(runs) > 1:
        print_plans(runs)
        return EXIT_DONE
    for config, planned in runs:
        if as_json:
            print(planned.model_dump_json(indent=2))
        else:
            print_plan(planned, config, everything=everything)
            _tell_study(config, planned)
    return EXIT_DONE


def _tell_study(config: RunConfig, planned: Plan) -> None:
    if not isinstance(config.study, NoStudy):
        from orchestrator.studies.run_study import outlook

        print("\n".join(outlook(config, planned)))


def _scaling(arguments: Sequence[str], counts: Sequence[int], *, as_json: bool) -> int:
    """Plans for several numbers of nodes, side by side; on paper, so no launcher has to be able to start them."""
    words, config_directory = _take_config_directory(arguments)
    composed = examine([*words, f"cluster.nodes={counts[0]}"], config_directory=config_directory)
    problems = [problem for problem in composed.problems if not any(rule in problem for rule in SHARED)]
    problems += [
        f"{key}: auto is settled for one number of nodes at a time; give a value here" for key in composed.autos
    ]
    if problems:
        raise ConfigError(problems)
    config = resolve(composed.config, Path.cwd())
    base, data = gather(config)
    rows = scaling_rows(config, counts, base=base, data=data)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
    else:
        print_scaling(rows, config)
    return EXIT_DONE


def render(arguments: Sequence[str]) -> int:
    """Writes the scripts into the run folder and prints them; submits nothing."""
    from orchestrator.execution.run_pipeline import freeze_run

    for config, planned in _runs(arguments):
        if not isinstance(config.study, NoStudy):
            raise ConfigError(
                f"study={config.study.kind}: scripts are of one run; leave out study=, and -m or the seeds of one trial"
            )
        scripts = render_scripts(config)
        freeze_run(config, planned, scripts)
        for script in scripts:
            print(f"# {script.path}")
            print(script.text)
    return EXIT_DONE


def run(arguments: Sequence[str], *, part: Part) -> int:
    """Checks, plans and launches; continues what is unfinished and skips what is done. With -m, one run each."""
    from orchestrator.execution.run_pipeline import WHOLE, execute, execute_all

    began = time.time()
    if is_sweep(arguments):
        config = _first_config(arguments)
        if isinstance(config.study, NoStudy):
            return execute_all(planned_runs(arguments))
    else:
        config, planned = planned_run(arguments)
        if isinstance(config.study, NoStudy):
            return execute(config, planned, part=part, began=began)
    from orchestrator.studies.run_study import run_study

    if part != WHOLE:
        raise ConfigError("--from and --only: a study runs whole pipelines; leave them out, or type study=none")
    return run_study(arguments, config, planned_run)


def resume(folder: RunFolder) -> int:
    """Goes on with a run from its folder alone."""
    from orchestrator.execution.run_pipeline import execute

    began = time.time()
    config = load_config(folder)
    refuse_newer(folder)
    problems = rule_problems(config)
    if problems:
        raise ConfigError(problems)
    done = fresh_stages(config, folder)
    if len(done) == len(config.pipeline):  # neither data nor base nor a right to write is needed for that
        print("\n".join(f"{stage}: done already; its result is {folder.stage(stage).result}" for stage in done))
        return EXIT_DONE
    lost = lost_inputs(config, folder, [name for name in config.pipeline if name not in done])
    if lost:
        raise ConfigError(lost)
    check_writable(folder.root, advice="copy the run folder to a disk of yours and resume the copy")
    with busy(LOOKING):
        machine = this_machine(config.cluster.environment)
        seen = as_seen(config, machine, None)
        base, data = gather(seen)
        data = with_speeds(seen, machine, base, data, may_measure=False)
    planned = make_plan(seen, base=base, data=data, number_type=settle_folder(config, folder, machine))
    return execute(config, planned, began=began)


def fork(
    parent: RunFolder,
    words: Sequence[str],
    *,
    stage: str | None,
    source: Literal["checkpoint", "artifact"] | None,
    step: int | None,
    until: Literal["describe", "write", "train"],
) -> int:
    """A new run from the checkpoint or artifact of `parent`, which is only read; described, written, or trained at once."""
    from orchestrator.housekeeping.fork import describe, plan_fork
    from orchestrator.housekeeping.fork_files import write_fork

    planned = plan_fork(parent, words, stage=stage, source=source, step=step)
    refuse_inside_a_run(planned.folder.root)
    print("\n".join(describe(planned)), flush=True)
    if until == "describe":
        print("nothing was written")
        return EXIT_DONE
    write_fork(planned)
    if until == "write":
        print(f"start it with: orchestrator resume {planned.folder.root}")
        return EXIT_DONE
    return resume(planned.folder)


def _runs(arguments: Sequence[str], *, measures: bool = False) -> list[tuple[RunConfig, Plan]]:
    """Every run that the words ask for; of a search, whose values are chosen on the way, one with the first of them."""
    if not is_sweep(arguments):
        return [planned_run(arguments, measures=measures)]
    is_study = not isinstance(_first_config(arguments).study, NoStudy)
    if is_study:
        return [planned_run(first_words(arguments), measures=measures)]
    return planned_runs(arguments, measures=measures)


def _first_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration of the first run of a multirun; ConfigError with every problem, those of a search's space too."""
    words, config_directory = _take_config_directory([word for word in arguments if word not in FLAGS])
    try:
        return composed_words(first_words(words), config_directory).config
    except ConfigError as error:
        from orchestrator.studies.run_study import space_problems

        raise ConfigError([*error.problems, *space_problems(words)]) from None


@busy(LOOKING)
def planned_run(arguments: Sequence[str], *, measures: bool = False) -> tuple[RunConfig, Plan]:
    """Configuration and plan; one error with every problem of words, keys, rules, base, data and scripts.

    `measures` lets the forecast time an unknown processor, which takes seconds; what starts a job does not wait for it.
    """
    return _planned_run(arguments, measures=measures)


def _planned_run(arguments: Sequence[str], *, measures: bool) -> tuple[RunConfig, Plan]:
    words, config_directory = _take_config_directory(arguments)
    composed = examine(words, config_directory=config_directory)
    if composed.autos and not composed.problems:
        from orchestrator.planning.auto_settings import settled_words

        kept = [word for word in words if word != "sharding=auto"]
        composed = examine([*kept, *settled_words(composed, config_directory)], config_directory=config_directory)
    config, problems = composed.config, composed.problems
    config = resolve(config, Path.cwd())
    machine = this_machine(config.cluster.environment)
    seen = as_seen(config, machine, config_directory)
    try:
        base, data = gather(seen)
    except OrchestratorError as error:
        raise ConfigError([*problems, *error.problems, *_script_problems(config)]) from None
    problems += _script_problems(config)
    if problems:
        raise ConfigError(problems)
    data = with_speeds(seen, machine, base, data, may_measure=measures)
    planned = make_plan(seen, base=base, data=data, notes=composed.notes, number_type=composed.number_type)
    return sized(config, base.architecture), planned


def composed_words(words: Sequence[str], config_directory: Path | None) -> Composed:
    """The composed words; ConfigError with every problem."""
    composed = examine(words, config_directory=config_directory)
    if composed.problems:
        raise ConfigError(composed.problems)
    return composed


def planned_runs(arguments: Sequence[str], *, measures: bool = False) -> list[tuple[RunConfig, Plan]]:
    """Every run of a multirun; one error with the problems of all of them before anything is written."""
    words, config_directory = _take_config_directory([word for word in arguments if word not in FLAGS])
    first = examine(first_words(words), config_directory=config_directory)
    problems = first.problems
    if problems:
        raise ConfigError(problems)
    folder = [] if config_directory is None else ["--config-dir", str(config_directory)]
    found: list[tuple[RunConfig, Plan]] = []
    told: dict[str, None] = {}
    with busy(LOOKING, unit="runs") as phases:
        for combination in combinations(words, name=first.config.name):
            try:
                found.append(_planned_run([*folder, *combination], measures=measures))
            except OrchestratorError as error:
                told |= dict.fromkeys(error.problems)
            phases.advance(len(found), unit="runs")
    if told:
        raise ConfigError(list(told))
    return found


def _script_problems(config: RunConfig) -> list[str]:
    """What the launcher cannot put into its scripts, each sentence once."""
    problems: dict[str, None] = {}
    for stage in [name for name in config.pipeline if name in config.stages]:
        try:
            render_script(config, stage)
        except InvalidValueError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def _take_config_directory(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    directory: Path | None = None
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--config-dir":
            value = value or next(words, "")
            if not value or directory is not None:
                raise ConfigError("--config-dir: one folder must follow, and it may stand once")
            directory = Path(value).expanduser()
        elif word.startswith("-"):
            raise ConfigError(f"{word}: no such option")
        else:
            rest.append(word)
    return rest, directory

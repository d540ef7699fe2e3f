"""Executes a plan: freezes the run folder, then starts its stages here or submits them to Slurm.

Must not import torch.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.spec import Script, write
from orchestrator import __version__
from orchestrator.config.base import JsonValue
from orchestrator.config.pipeline import descendants, inputs_of
from orchestrator.config.run import PARENT, RunConfig
from orchestrator.display.result_text import print_result, warn_lines
from orchestrator.errors import (
    EXIT_DONE,
    EXIT_SAVED,
    ConfigError,
    RunFolderError,
)
from orchestrator.execution.following import StageJob, Watch, live_claim, run_stage
from orchestrator.execution.job_specs import job_spec
from orchestrator.execution.job_specs import render as render_script
from orchestrator.files.atomic import os_sentence, read_json, write_json
from orchestrator.installation.versions import RUN_PACKAGES, versions_of
from orchestrator.machine.dtype import KEY as DTYPE
from orchestrator.planning.inspect_inputs import validate_data
from orchestrator.planning.records import Plan
from orchestrator.run_folder.folder import RunFolder, run_directory_of
from orchestrator.run_state.content_digests import changed_content
from orchestrator.run_state.freeze import (
    all_or_nothing,
    check_writable,
    differences,
    freeze,
    inherited,
    refuse_inside_a_run,
)
from orchestrator.run_state.frozen import filled_sentence, load_frozen, read_config, refuse_newer
from orchestrator.run_state.location import settle
from orchestrator.run_state.moved import refuse_left_behind
from orchestrator.run_state.resume_rules import may_differ
from orchestrator.run_state.reuse import move_superseded, rerunnable_keys, up_to_date_stages
from orchestrator.text.durations import duration_words


@dataclass(frozen=True, kw_only=True)
class StageSelection:
    """The selected stages of a pipeline."""

    only: str | None = None
    """Only this stage."""
    rerun_from: str | None = None
    """Run this stage again, with all that depend on it."""


ALL_STAGES = StageSelection()


def execute(
    config: RunConfig,
    planned: Plan,
    preparations: dict[str, str] | None = None,
    *,
    part: StageSelection = ALL_STAGES,
    watch: Watch = lambda _stage: False,
    began: float | None = None,
) -> int:
    """`began` is the start time of the command, for its displayed duration; now if unknown. `preparations` are the
    Slurm jobs, by what they prepare, that other runs of a multirun have submitted.
    """
    started = began = time.time() if began is None else began
    folder = RunFolder(run_directory_of(config))
    if folder.run.exists():
        refuse_newer(folder)
    unfinished, to_rerun = _to_do(config, folder, part)
    scripts = {stage: render_script(config, stage) for stage in config.pipeline}
    steps = {stage.name: stage.steps or 0 for stage in planned.stages}
    jobs = [
        StageJob(name=stage, spec=job_spec(config, stage), script=scripts[stage], steps=steps[stage])
        for stage in unfinished
    ]
    running = [job.name for job in jobs if live_claim(job.spec, folder) is not None]
    if running:  # joined unchanged: no file of a running stage is rewritten
        _refuse_changes(config, folder, running, to_rerun)
    else:
        refuse_left_behind(folder, unfinished)
        if unfinished:
            _refuse_elsewhere(config, scripts[unfinished[0]])
            validate_data(config)
        freeze_run(config, planned, scripts.values())
        print("\n".join(move_superseded(folder, to_rerun)), end="\n" if to_rerun else "")
        warn_lines(planned)
    for stage in config.pipeline:
        if stage not in unfinished and folder.stage(stage).result.exists():
            print(f"{stage}: done already; its result is {folder.stage(stage).result}")
    if config.launcher.kind == "slurm":
        from orchestrator.execution.slurm_following import join_jobs
        from orchestrator.execution.slurm_submission import submit

        live = submit(config, unfinished, preparations) if unfinished else {}
        if not live or preparations is not None:  # with many runs none is followed: the next ones have to be submitted
            return EXIT_DONE
        return join_jobs(config, folder, jobs, began=began)
    for job in jobs:
        code = run_stage(config, folder, job, watch=watch, began=began)
        if code != EXIT_DONE:
            return code
        ended = time.time()
        print_result(folder.stage(job.name), config, wall_seconds=ended - began)
        began = ended  # inspecting the inputs counts towards the first stage, which could not start earlier
    if len(unfinished) > 1:
        print(f"\nall {len(unfinished)} stages took {duration_words((time.time() - started) / 3600)}")
    return EXIT_DONE


def _to_do(config: RunConfig, folder: RunFolder, part: StageSelection) -> tuple[list[str], list[str]]:
    """(stages to run, stages among them whose old folders are moved aside)."""
    for name in (part.only, part.rerun_from):
        if name is not None and name not in config.pipeline:
            raise ConfigError(f"{name}: no stage of this pipeline; there are {', '.join(config.pipeline)}")
    fresh = up_to_date_stages(config, folder)
    changed = {name for name in config.pipeline if name not in fresh and folder.stage(name).result.exists()}
    if len(config.pipeline) == 1 and part.rerun_from is None:
        _refuse_changed_content(config, folder, changed)
    if part.rerun_from is not None:
        changed.add(part.rerun_from)
    to_rerun = list(descendants(config, changed))
    unfinished = [name for name in config.pipeline if name not in fresh or name in to_rerun]
    if part.rerun_from is not None:
        unfinished = [name for name in unfinished if name in to_rerun]
    if part.only is not None:
        unfinished = [name for name in unfinished if name == part.only]
        to_rerun = [name for name in to_rerun if name == part.only]
    missing = {source for name in unfinished for source in inputs_of(config, name)} - {*fresh, *unfinished, PARENT}
    if missing:
        old = [name for name in sorted(missing) if folder.stage(name).result.exists()]
        why = f" (what {', '.join(old)} was made from changed since)" if old else ""
        raise ConfigError(
            f"{', '.join(sorted(missing))}: not done yet, and needed by {', '.join(unfinished)}; run it first{why}"
        )
    return unfinished, to_rerun


def _refuse_changed_content(config: RunConfig, folder: RunFolder, changed: set[str]) -> None:
    """Refuse changed inputs of a finished single-stage run: other rows or another base make another run."""
    for name in changed:
        contents = changed_content(config, folder, name)
        if contents:
            raise ConfigError(
                f"{name} is done, and its {' and '.join(contents)} changed since; start another run with name=, or type "
                f"--from {name} to rerun it"
            )


def execute_all(runs: Sequence[tuple[RunConfig, Plan]]) -> int:
    """Run each in turn. A failed run does not stop the sweep; an interrupt does."""
    if runs[0][0].launcher.array:
        return _submit_arrays(runs)
    codes: dict[str, int] = {}
    prepared: dict[str, str] = {}
    for config, planned in runs:
        print(f"run {len(codes) + 1} of {len(runs)}: {config.name}", flush=True)
        codes[config.name] = execute(config, planned, prepared)
        if codes[config.name] == EXIT_SAVED:
            break
    print(f"all runs: orchestrator status {runs[0][0].output_dir}")
    bad = {name: code for name, code in codes.items() if code != EXIT_DONE}
    for name, code in bad.items():
        print(f"error: {name} ended with exit code {code}", file=sys.stderr)
    return next(iter(bad.values()), EXIT_DONE)


def _submit_arrays(runs: Sequence[tuple[RunConfig, Plan]]) -> int:
    from orchestrator.execution.slurm_submission import submit_arrays

    for config, planned in runs:
        validate_data(config)
        freeze_run(config, planned, [render_script(config, stage) for stage in config.pipeline])
    return submit_arrays([config for config, _ in runs])


def _refuse_elsewhere(config: RunConfig, script: Script) -> None:
    """Refuse what this machine alone cannot run, before anything is written."""
    if config.cluster.nodes > 1 and config.launcher.kind != "slurm":
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}: this machine is one node; type render, and start {script.path} on "
            "every node, or use launcher=slurm"
        )


def _refuse_changes(config: RunConfig, folder: RunFolder, running: Sequence[str], to_rerun: Sequence[str]) -> None:
    """A running stage can be joined, not changed."""
    moved = [name for name in to_rerun if name in running]
    if moved:
        raise ConfigError(
            f"{', '.join(moved)} is running and cannot be rerun: type `cancel {folder.root}` first, or leave out --from"
        )
    changed = [
        key
        for key in differences(read_config(folder), config.model_dump(mode="json"))
        if key not in ("name", "output_dir")  # seen through a link or another mount
    ]
    if changed:
        raise RunFolderError(
            f"{', '.join(running)} is running with other values of {', '.join(changed)}: leave them out to join it, or type "
            f"`cancel {folder.root}` and repeat this command"
        )


def freeze_run(config: RunConfig, planned: Plan, scripts: Iterable[Script]) -> None:
    """Write everything a run needs before it starts; a new run folder appears complete or not at all.

    An existing plan of the same configuration is kept: later measurements must not be compared with a plan made from
    them.
    """
    folder = RunFolder(run_directory_of(config))
    refuse_inside_a_run(folder.root)
    record: dict[str, JsonValue] = {"orchestrator": __version__, "config": config.model_dump(mode="json")}
    if planned.dtype_is_auto:
        record["auto"] = {DTYPE: planned.dtype_reason}
    filled: frozenset[str] = frozenset()
    if folder.run.exists():
        refuse_newer(folder)
        frozen = load_frozen(folder)
        filled = frozenset(frozen.filled)
        record |= {"added": dict(frozen.added)} if frozen.added else {}
        if filled:
            print(f"warning: {filled_sentence(frozen)}", file=sys.stderr)
    record |= inherited(folder)
    is_planned = folder.plan.exists() and folder.run.exists() and read_json(folder.run) == record
    check_writable(folder.root)
    with all_or_nothing(folder.root):
        freeze(folder, record, may_differ=may_differ(config) | rerunnable_keys(config, folder) | filled)
        notice = settle(folder, config.pipeline)
        if notice is not None:
            print(f"{config.name}: {notice}", flush=True)
        if not is_planned:
            write_json(folder.plan, planned.model_dump(mode="json"))
        if not folder.environment.exists():
            write_json(folder.environment, _environment())
        for stage in planned.stages:
            if stage.deepspeed is not None:
                write_json(folder.stage(stage.name).deepspeed, stage.deepspeed)
        for script in scripts:
            _write_script(script)


def _write_script(script: Script) -> None:
    try:
        write(script)
    except OSError as error:
        raise RunFolderError(os_sentence(Path(script.path), error)) from None


def _environment() -> dict[str, JsonValue]:
    """Versions and machine of the login side; no environment variables, which may contain secrets."""
    return {
        "orchestrator": __version__,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "packages": dict(versions_of(RUN_PACKAGES)),
    }

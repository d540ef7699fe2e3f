"""The verbs that start from a configuration: plan, render, run, resume. Must not import torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from launchers.process import Outcome, launch
from launchers.spec import InvalidValueError, Script, write
from orchestrator import __version__
from orchestrator.attempts import close_attempt, decide, read_attempts
from orchestrator.compose import examine
from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig, parse
from orchestrator.errors import (
    EXIT_DONE,
    EXIT_LAUNCH_FAILED,
    EXIT_SAVED,
    ConfigError,
    LaunchFailed,
    OrchestratorError,
    RunFolderError,
)
from orchestrator.facts import gather, validate_data
from orchestrator.freezing import all_or_nothing, freeze, read_config
from orchestrator.jobs import job_spec
from orchestrator.jobs import render as render_script
from orchestrator.metrics.console import show_progress, view_of_stage
from orchestrator.plan import Plan, make_plan, resolve, run_directory_of
from orchestrator.resume import may_differ
from orchestrator.rundir import RunFolder, StageFolder, os_sentence, write_json
from orchestrator.submission import submit
from orchestrator.tables import print_plan, print_result, warn_lines

PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
    "wandb",
)


def plan(arguments: Sequence[str]) -> int:
    """Prints what would happen; writes nothing."""
    words, form = _take_format(arguments)
    config, planned = planned_run(words)
    if form == "json":
        print(planned.model_dump_json(indent=2))
    else:
        print_plan(planned, config)
    return EXIT_DONE


def render(arguments: Sequence[str]) -> int:
    """Writes the scripts into the run folder and prints them; submits nothing."""
    config, planned = planned_run(arguments)
    scripts = [render_script(config, stage) for stage in config.pipeline]
    freeze_run(config, planned, scripts)
    for script in scripts:
        print(f"# {script.path}")
        print(script.text)
    return EXIT_DONE


def run(arguments: Sequence[str]) -> int:
    """Checks, plans and launches; continues what is unfinished and skips what is done."""
    config, planned = planned_run(arguments)
    return _execute(config, planned)


def resume(arguments: Sequence[str]) -> int:
    """Goes on with a run from its folder alone."""
    from orchestrator.cli import run_folder_argument

    folder = RunFolder(run_folder_argument(arguments, "resume"))
    config = load_config(folder)
    base, data = gather(config)
    return _execute(config, make_plan(config, base=base, data=data))


def load_config(folder: RunFolder) -> RunConfig:
    """The frozen configuration of a run folder."""
    return parse(read_config(folder))


def planned_run(arguments: Sequence[str]) -> tuple[RunConfig, Plan]:
    """Configuration and plan; one error with every problem of words, keys, rules, base, data and scripts."""
    words, config_directory = _take_config_directory(arguments)
    config, problems = examine(words, config_directory=config_directory)
    config = resolve(config, Path.cwd())
    try:
        base, data = gather(config)
    except OrchestratorError as error:
        raise ConfigError([*problems, *error.problems, *_script_problems(config)]) from None
    problems += _script_problems(config)
    if problems:
        raise ConfigError(problems)
    return config, make_plan(config, base=base, data=data)


def _script_problems(config: RunConfig) -> list[str]:
    """What the launcher cannot put into its scripts, each sentence once."""
    problems: dict[str, None] = {}
    for stage in config.pipeline:
        try:
            render_script(config, stage)
        except InvalidValueError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def _execute(config: RunConfig, planned: Plan) -> int:
    folder = RunFolder(run_directory_of(config))
    unfinished = [stage for stage in config.pipeline if not folder.stage(stage).result.exists()]
    scripts = {stage: render_script(config, stage) for stage in config.pipeline}
    if unfinished:
        _refuse_elsewhere(config, scripts[unfinished[0]])
        validate_data(config)
    freeze_run(config, planned, scripts.values())
    warn_lines(planned)
    for stage in config.pipeline:
        if stage not in unfinished:
            print(f"{stage}: done already; its result is {folder.stage(stage).result}")
    if config.launcher.kind == "slurm":
        return submit(config, unfinished) if unfinished else EXIT_DONE
    for stage in unfinished:
        code = _launch_stage(config, planned, folder, stage)
        if code != EXIT_DONE:
            return code
        print_result(folder.stage(stage), config)
    return EXIT_DONE


def _refuse_elsewhere(config: RunConfig, script: Script) -> None:
    """What this machine alone cannot run is refused before anything is written."""
    if config.cluster.nodes > 1 and config.launcher.kind != "slurm":
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}: this machine is one node; type render, and start {script.path} on "
            "every node, or take launcher=slurm"
        )


def _launch_stage(config: RunConfig, planned: Plan, folder: RunFolder, stage: str) -> int:
    files = folder.stage(stage)
    steps = next(entry.steps for entry in planned.stages if entry.name == stage)
    spec = job_spec(config, stage)
    print(f"{stage}: {spec.script_path}; log {files.logs}", flush=True)
    with launch(render_script(config, stage), spec) as running:
        interrupts = 0
        while running.is_running():
            view = view_of_stage(stage, metrics_file=files.metrics, events_file=files.events, total_steps=steps or 0)
            try:
                show_progress(view, running.is_running)
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 1:
                    print("\nasked the job to save and end; a second Ctrl-C ends it at once", flush=True)
                    running.stop()
                else:
                    running.kill()
        outcome = running.poll()
    assert outcome is not None
    return _after(config, files, stage, outcome)


def _after(config: RunConfig, files: StageFolder, stage: str, outcome: Outcome) -> int:
    """Tells how the attempt ended, from its record."""
    if files.result.exists():
        return EXIT_DONE
    code, cause = outcome.exit_code, None if outcome.cause is None else str(outcome.cause)
    earlier = [attempt.number for attempt in read_attempts(files)]
    if outcome.attempt is None and (code == EXIT_LAUNCH_FAILED or not earlier):
        raise LaunchFailed(f"{stage}: it ended with exit code {code} before an attempt: {outcome.last_words or cause}")
    attempt = close_attempt(files, outcome.attempt or earlier[-1], code)
    decision = decide(files, config, attempt)
    if decision.exit_code == EXIT_SAVED:
        print(f"{stage}: saved at step {attempt.step} ({attempt.why}); the same command goes on from there")
        return EXIT_SAVED
    _tell_failure(stage, decision.why, cause, str(files.logs))
    return decision.exit_code


def _tell_failure(stage: str, why: str, cause: str | None, logs: str) -> None:
    print(f"error: {stage}: {why}", file=sys.stderr)
    if cause is not None and cause not in why:
        print(f"error: first cause: {cause}", file=sys.stderr)
    print(f"the whole log is in {logs}", file=sys.stderr)


def freeze_run(config: RunConfig, planned: Plan, scripts: Iterable[Script]) -> None:
    """Writes all that a run needs before it starts; a new run folder comes whole or not at all."""
    folder = RunFolder(run_directory_of(config))
    record: dict[str, JsonValue] = {"orchestrator": __version__, "config": config.model_dump(mode="json")}
    with all_or_nothing(folder.root):
        freeze(folder, record, may_differ=may_differ(config))
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
    """Versions and machine of the login side; no variables, which may hold secrets."""
    installed = {name: _version(name) for name in PACKAGES}
    return {
        "orchestrator": __version__,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "packages": dict(installed),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _take_format(arguments: Sequence[str]) -> tuple[list[str], str]:
    forms = [word.removeprefix("format=") for word in arguments if word.startswith("format=")]
    if forms and forms[-1] not in ("json", "table"):
        raise ConfigError(f"format={forms[-1]}: json or table is allowed")
    return [word for word in arguments if not word.startswith("format=")], forms[-1] if forms else "table"


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
            raise ConfigError(f"{word}: no such option; --config-dir DIR and --help are there")
        else:
            rest.append(word)
    return rest, directory

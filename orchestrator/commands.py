"""The verbs that start from a configuration: plan, render, run, resume. Must not import torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from launchers.process import launch
from launchers.spec import write
from orchestrator import __version__
from orchestrator.attempts import close_attempt, decide, read_attempts
from orchestrator.compose import compose
from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig, parse
from orchestrator.errors import EXIT_DONE, EXIT_SAVED, ConfigError, LaunchFailed
from orchestrator.facts import gather, validate_data
from orchestrator.jobs import job_spec
from orchestrator.jobs import render as render_script
from orchestrator.metrics.console import show_progress, view_of_stage
from orchestrator.plan import Plan, make_plan, resolve, run_directory_of
from orchestrator.rundir import RunFolder, freeze, read_json, write_json
from orchestrator.tables import print_plan, print_result, warn_lines

MAY_DIFFER = frozenset({"tracking", "launcher"})
"""Keys that may change between attempts at one run: they do not change its result."""
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
    config, planned = _planned(words)
    if form == "json":
        print(planned.model_dump_json(indent=2))
    else:
        print_plan(planned, config)
    return EXIT_DONE


def render(arguments: Sequence[str]) -> int:
    """Writes the scripts into the run folder and prints them; submits nothing."""
    config, planned = _planned(arguments)
    _freeze(config, planned)
    for stage in config.pipeline:
        script = render_script(config, stage)
        print(f"# {write(script)}")
        print(script.text)
    return EXIT_DONE


def run(arguments: Sequence[str]) -> int:
    """Checks, plans and launches; continues what is unfinished and skips what is done."""
    config, planned = _planned(arguments)
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
    return parse(read_json(folder.run)["config"])


def _planned(arguments: Sequence[str]) -> tuple[RunConfig, Plan]:
    words, config_directory = _take_config_directory(arguments)
    config = resolve(compose(words, config_directory=config_directory), Path.cwd())
    base, data = gather(config)
    return config, make_plan(config, base=base, data=data)


def _execute(config: RunConfig, planned: Plan) -> int:
    folder = RunFolder(run_directory_of(config))
    unfinished = [stage for stage in config.pipeline if not folder.stage(stage).result.exists()]
    scripts = {stage: render_script(config, stage) for stage in config.pipeline}
    if unfinished:
        validate_data(config)
    _freeze(config, planned)
    for script in scripts.values():
        write(script)
    warn_lines(planned)
    for stage in config.pipeline:
        if stage not in unfinished:
            print(f"{stage}: done already; its result is {folder.stage(stage).result}")
            continue
        code = _launch_stage(config, planned, folder, stage)
        if code != EXIT_DONE:
            return code
        print_result(folder.stage(stage), config)
    return EXIT_DONE


def _launch_stage(config: RunConfig, planned: Plan, folder: RunFolder, stage: str) -> int:
    if config.launcher.kind == "slurm":
        raise LaunchFailed("launcher=slurm: submitting is not there yet; `render` writes the script, sbatch submits it")
    if config.cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}: this machine is one node; type render, and start "
            f"{render_script(config, stage).path} on every node, or take launcher=slurm"
        )
    files = folder.stage(stage)
    steps = next(entry.steps for entry in planned.stages if entry.name == stage)
    view = view_of_stage(stage, metrics_file=files.metrics, events_file=files.events, total_steps=steps or 0)
    spec = job_spec(config, stage)
    print(f"{stage}: {spec.script_path}; log {files.logs}", flush=True)
    with launch(render_script(config, stage), spec) as running:
        interrupts = 0
        while running.is_running():
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
    cause = None if outcome.cause is None else str(outcome.cause)
    return _after(config, folder, stage, outcome.exit_code, cause=cause, last_words=outcome.last_words)


def _after(config: RunConfig, folder: RunFolder, stage: str, code: int, *, cause: str | None, last_words: str) -> int:
    """Tells how the attempt ended, from its record."""
    files = folder.stage(stage)
    if files.result.exists():
        return EXIT_DONE
    attempts = read_attempts(files)
    if not attempts:
        raise LaunchFailed(f"{stage}: it ended with exit code {code} before its first attempt: {last_words or cause}")
    decision = decide(files, config, close_attempt(files, attempts[-1].number, code))
    if decision.exit_code == EXIT_SAVED:
        print(f"{stage}: saved at step {attempts[-1].step} ({attempts[-1].why}); the same command goes on from there")
        return EXIT_SAVED
    _tell_failure(stage, decision.why, cause, str(files.logs))
    return decision.exit_code


def _tell_failure(stage: str, why: str, cause: str | None, logs: str) -> None:
    print(f"error: {stage}: {why}", file=sys.stderr)
    if cause is not None and cause not in why:
        print(f"error: first cause: {cause}", file=sys.stderr)
    print(f"the whole log is in {logs}", file=sys.stderr)


def _freeze(config: RunConfig, planned: Plan) -> None:
    folder = RunFolder(run_directory_of(config))
    record: dict[str, JsonValue] = {"orchestrator": __version__, "config": config.model_dump(mode="json")}
    is_new = freeze(folder, record, may_differ=MAY_DIFFER)
    write_json(folder.plan, planned.model_dump(mode="json"))
    if is_new:
        write_json(folder.environment, _environment())
    for stage in planned.stages:
        if stage.deepspeed is not None:
            write_json(folder.stage(stage.name).deepspeed, stage.deepspeed)


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
    words = list(arguments)
    if "--config-dir" not in words:
        unknown = [word for word in words if word.startswith("-")]
        if unknown:
            raise ConfigError(f"{unknown[0]}: no such option; --config-dir DIR and --help are there")
        return words, None
    position = words.index("--config-dir")
    if position + 1 == len(words):
        raise ConfigError("--config-dir: a folder must follow")
    return words[:position] + words[position + 2 :], Path(words[position + 1])

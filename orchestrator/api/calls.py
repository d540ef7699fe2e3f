"""The Python API behind `from orchestrator import compose, plan, run, resume, status, load`: the code of the verbs, with typed
results. Must not import torch before `load` is called.

An override is a string in Hydra's grammar (`"+experiment=llama_lora"`), or a mapping of keys to Python values, which needs no quoting:

    run("+experiment=llama_lora", {"name": "mine", "stages.sft.data.train.path": "my rows.jsonl"})
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from orchestrator.commands.plan_from_overrides import compose_overrides, planned_run
from orchestrator.commands.resume import resume as resume_run
from orchestrator.commands.run import run as run_overrides
from orchestrator.composition.overrides import duplicated_keys
from orchestrator.config.run import RunConfig
from orchestrator.errors import (
    EXIT_DO_NOT_RESTART,
    EXIT_DONE,
    EXIT_SAVED,
    ConfigError,
    LaunchFailed,
    TrainingFailed,
)
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import Row, last_attempt_rows, read_rows
from orchestrator.monitoring.stage_status import StageStatus, find_runs, stage_statuses
from orchestrator.planning.records import Plan
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.attempts import read_attempts
from orchestrator.run_state.opened_model import OpenedModel

Override: TypeAlias = "str | Mapping[str, object]"
Folder: TypeAlias = "str | Path"


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: what result.json says, typed where scripts need it."""

    name: str
    kind: str
    folder: Path
    artifact: Path
    steps: int | None
    """Optimizer steps; None, like the losses, for a stage that trains nothing."""
    loss_before: float | None
    """Mean held-out loss in nats per trained token, before the first step."""
    loss_after: float | None
    proven_loss: float | None
    """Loss of the artifact, re-opened in a fresh process."""
    record: Mapping[str, Any]
    """The whole content of result.json."""

    def metrics(self) -> list[Row]:
        """Rows of metrics.jsonl in step order; of a replayed step, the last."""
        return last_attempt_rows(read_rows(StageFolder(self.folder).metrics))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    folder: Path
    outcome: Literal["finished", "saved", "submitted"]
    """`saved`: interrupted or asked to stop, continue with `resume(folder)`; `submitted`: Slurm has it, query
    `status(folder)`."""
    stages: Mapping[str, StageResult]
    """Finished stages by name, in the order of the pipeline."""


def compose(*overrides: Override, config_directory: Folder | None = None) -> RunConfig:
    """The validated configuration; ConfigError with every problem."""
    arguments = _arguments(overrides, config_directory=None)
    return compose_overrides(arguments, None if config_directory is None else Path(config_directory)).config


def plan(*overrides: Override, config_directory: Folder | None = None) -> Plan:
    """What `run` would do: data, steps, memory, time. Writes nothing."""
    return planned_run(_arguments(overrides, config_directory=config_directory))[1]


def run(*overrides: Override, config_directory: Folder | None = None) -> RunResult:
    """Check, plan, launch and wait, with progress on standard output; continue an unfinished run, skip finished stages.

    Raises ConfigError before anything starts, LaunchFailed or TrainingFailed if a stage ends without a result.
    """
    from orchestrator.execution.run_pipeline import ALL_STAGES

    arguments = _arguments(overrides, config_directory=config_directory)
    config, planned = planned_run(arguments)
    if config.study.kind != "none":
        raise ConfigError(
            f"study={config.study.kind}: a study is many runs; use the command line, or call run for each of them"
        )
    return _ended(RunFolder(Path(planned.run_directory)), run_overrides(arguments, part=ALL_STAGES))


def resume(folder: Folder) -> RunResult:
    """Continue a run from its folder, even if moved; raises like `run`."""
    found = _run_folder(folder)
    return _ended(found, resume_run(found))


def status(folder: Folder) -> list[StageStatus]:
    """Every stage of a run, or of every run in an output folder."""
    root = Path(folder).expanduser().resolve()
    runs = find_runs(root)
    if not runs:
        raise ConfigError(f"{folder} is not a run folder, and holds none: there is no run.json")
    return stage_statuses(runs)


def load(folder: Folder, *, stage: str | None = None) -> OpenedModel:
    """Model and tokenizer of a finished run (of its last stage that yields a model), on the device that a run would
    train on.

    Imports torch and transformers. ConfigError if the stage is not finished or yields no model.
    """
    opened = import_module("orchestrator.evaluation.open_model")  # torch is imported here and nowhere earlier
    return opened.open_run(_run_folder(folder), stage)


def _arguments(overrides: Sequence[object], *, config_directory: Folder | None) -> list[str]:
    arguments = [] if config_directory is None else ["--config-dir", str(config_directory)]
    for override in overrides:
        if isinstance(override, str):
            if override.startswith("-"):
                raise ConfigError(f"{override}: options belong to the command line; give overrides, such as name=mine")
            arguments.append(override)
        elif not isinstance(override, Mapping):
            raise ConfigError(
                f"{override!r} is not an override; give strings and mappings one by one: run(*overrides), not run(overrides)"
            )
        else:
            entries = cast("Mapping[str, object]", override).items()
            arguments += [f"{key}={_hydra_text(value)}" for key, value in entries]
    if problems := duplicated_keys(arguments):
        raise ConfigError(problems)
    return arguments


def _hydra_text(value: object) -> str:
    """A Python value in Hydra's grammar, quoted so that it round-trips."""
    from hydra.core.override_parser.types import Quote, QuotedString

    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str() | Path():
            return QuotedString(text=str(value), quote=Quote.single).with_quotes()
        case list() | tuple():
            return f"[{','.join(_hydra_text(entry) for entry in cast('Sequence[object]', value))}]"
        case dict():
            entries = cast("dict[str, object]", value).items()
            return "{" + ",".join(f"{_dict_key(key)}:{_hydra_text(entry)}" for key, entry in entries) + "}"
        case _:
            kinds = "None, bool, int, float, str, Path, list, tuple and dict"
            raise ConfigError(f"{value!r} ({type(value).__name__}) is not a valid value; allowed are {kinds}")


def _dict_key(key: str) -> str:
    # Hydra's grammar has no quotes around keys.
    if re.fullmatch(r"[A-Za-z_][\w.-]*", key, re.ASCII) is None:
        raise ConfigError(f"{key!r} is not a valid key in an override; allowed are letters, digits, dots, - and _")
    return key


def _run_folder(folder: Folder) -> RunFolder:
    root = Path(folder).expanduser()
    if not RunFolder(root).is_run:
        raise ConfigError(f"{folder} is not a run folder: it holds no run.json")
    return RunFolder(root.resolve())


def _ended(folder: RunFolder, code: int) -> RunResult:
    from orchestrator.monitoring.stage_status import pipeline_of

    names = pipeline_of(folder)
    results = {name: _stage_result(name, folder.stage(name)) for name in names if folder.stage(name).result.exists()}
    if code not in (EXIT_DONE, EXIT_SAVED):
        raise _failure(folder, [name for name in names if name not in results], code)
    finished = "finished" if len(results) == len(names) else "submitted"
    return RunResult(folder=folder.root, outcome="saved" if code == EXIT_SAVED else finished, stages=results)


def _failure(folder: RunFolder, unfinished: Sequence[str], code: int) -> LaunchFailed | TrainingFailed:
    """The reason that the newest attempt recorded."""
    attempts = [(name, attempt) for name in unfinished for attempt in read_attempts(folder.stage(name))[-1:]]
    why = [f"{name}: {attempt.why}" for name, attempt in attempts] or [f"{folder.root}: ended with exit code {code}"]
    return (TrainingFailed if code == EXIT_DO_NOT_RESTART else LaunchFailed)(why)


def _stage_result(name: str, files: StageFolder) -> StageResult:
    record: dict[str, Any] = read_json(files.result)
    return StageResult(
        name=name,
        kind=record["kind"],
        folder=files.root,
        artifact=files.artifact,
        steps=record.get("steps"),
        loss_before=record.get("eval_loss_before"),
        loss_after=record.get("eval_loss_after"),
        proven_loss=record.get("proof", {}).get("reopened_loss"),
        record=record,
    )

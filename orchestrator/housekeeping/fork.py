"""The inputs of a fork, and what it may not change; `fork_files` writes it. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.composition.frozen_overrides import changed_values
from orchestrator.config.base import JsonValue, flatten
from orchestrator.config.pipeline import start_kinds
from orchestrator.config.pipeline_rules import pipeline_problems
from orchestrator.config.rules import parse_types, rule_problems
from orchestrator.config.run import PARENT, RunConfig, made_kind, training_pipeline, training_stages
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import MANIFEST, file_digest
from orchestrator.planning.absolute_paths import resolve
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import RunFolder, StageFolder, run_directory_of
from orchestrator.run_state.frozen import load_frozen, refuse_newer
from orchestrator.run_state.resume_rules import is_below, settings_that_matter

Source = Literal["checkpoint", "artifact"]
SAME_PROBE = ("optimizer", "schedule", "max_steps", "epochs", "batch")
"""Keys of a stage that do not affect the loss of given weights on the probe's rows."""


@dataclass(frozen=True, kw_only=True)
class Fork:
    """The inputs of a fork; nothing is written yet."""

    parent: RunFolder
    stage: str
    source: Source
    config: RunConfig
    changes: Mapping[str, tuple[JsonValue, JsonValue]]
    """Key -> value of the parent, value of the fork; without name and output_dir."""
    checkpoint: checkpoints.VerifiedCheckpoint | None
    notes: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(run_directory_of(self.config))


def plan_fork(
    parent: RunFolder, overrides: Sequence[str], *, stage: str | None, source: Source | None, step: int | None
) -> Fork:
    """Check everything that can be known before the first byte is copied; ConfigError with every problem."""
    refuse_newer(parent)
    old = load_frozen(parent).values  # with the parent's current path, and defaults for keys newer than it
    values = changed_values(old, overrides)
    if values.get("name") == old.get("name"):
        raise ConfigError("fork: the new run needs a name of its own, such as name=second")
    before = resolve(parse_types(old), Path.cwd())
    chosen = _stage(before, parent, stage)
    files = parent.stage(chosen)
    kind: Source = source or ("checkpoint" if step is not None or not files.result.exists() else "artifact")
    if kind == "artifact" and step is not None:
        raise ConfigError("--step belongs to a checkpoint; type --from checkpoint")
    if kind == "artifact":
        values = _put(values, f"stages.{chosen}.start_from", PARENT)
    config = resolve(parse_types(values), Path.cwd())
    found = _checkpoint(files, step) if kind == "checkpoint" else None
    changes = _changes(before, config)
    problems = [*rule_problems(config), *pipeline_problems(config), *_refused(before, changes, chosen, kind)]
    if found is not None:
        problems += _steps_left(files, found, config, chosen, changes)
    else:
        problems += _artifact_problems(parent, before, config, chosen)
    if problems:
        raise ConfigError(problems)
    notes: list[str] = []
    if found is not None:
        config, notes = _accepting(config, found, chosen, changes)
    return Fork(
        parent=parent,
        stage=chosen,
        source=kind,
        config=config,
        changes=changes,
        checkpoint=found,
        notes=tuple(notes),
    )


def describe(fork: Fork) -> list[str]:
    """Notices for the user before the fork trains."""
    lines = [f"fork of {fork.parent.root}, stage {fork.stage}, into {fork.folder.root}"]
    if fork.checkpoint is not None:
        lines.append(
            f"from its checkpoint of step {fork.checkpoint.step}: weights, optimizer state, schedule and position in the data are kept"
        )
    else:
        lines.append(
            "from its proven artifact: training begins at step 0 with a new optimizer, schedule and data order"
        )
    lines += [f"  {key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in fork.changes.items()]
    return [*lines, *fork.notes]


def _stage(config: RunConfig, parent: RunFolder, chosen: str | None) -> str:
    """The requested stage; else the first one that was interrupted, else the last that trained to its end."""
    trains = list(training_pipeline(config))
    if chosen is not None and chosen not in trains:
        raise ConfigError(f"--stage {chosen}: the stages that train are {', '.join(trains) or 'none'}")
    begun = [name for name in trains if _has_begun(parent.stage(name))]
    unfinished = [name for name in begun if not parent.stage(name).result.exists()]
    wanted = chosen or next(iter([*unfinished, *reversed(begun)]), None)
    if wanted is None or wanted not in begun:
        raise ConfigError(
            f"{parent.root}: {wanted or 'no stage'} has neither a checkpoint nor an artifact yet; start a new run instead"
        )
    return wanted


def _has_begun(files: StageFolder) -> bool:
    return files.result.exists() or bool(checkpoints.saved_steps(files))


def _checkpoint(files: StageFolder, step: int | None) -> checkpoints.VerifiedCheckpoint:
    steps = checkpoints.saved_steps(files)
    if step is not None and step not in steps:
        raise ConfigError(f"--step {step}: the checkpoints in {files.checkpoints} are of steps {steps or 'none'}")
    if step is not None:
        return checkpoints.verify(files.checkpoint(step))
    found, refused = checkpoints.newest_valid(files)
    if found is None:
        faults = [problem for problems in refused.values() for problem in problems]
        raise ConfigError(
            [f"{files.checkpoints} holds no proven checkpoint; a finished stage forks --from artifact", *faults]
        )
    return found


def proven_digest(files: StageFolder) -> str | None:
    """The digest of a finished stage's artifact, independent of its run's path; None if it is not the proven one."""
    if not files.result.exists() or not (files.artifact / MANIFEST).is_file():
        return None
    digest = file_digest(files.artifact / MANIFEST)
    return digest if digest == read_json(files.result)["artifact"]["manifest_sha256"] else None


def _changes(before: RunConfig, after: RunConfig) -> dict[str, tuple[JsonValue, JsonValue]]:
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, after))
    keys = [key for key in dict.fromkeys([*new, *old]) if key not in ("name", "output_dir")]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _refused(
    before: RunConfig, changes: Mapping[str, tuple[JsonValue, JsonValue]], stage: str, source: Source
) -> list[str]:
    """Changes after which the weights, or the optimizer's states, would not fit."""
    fixed = {"model.base", "tuning", "quantization", f"stages.{stage}.tuning", f"stages.{stage}.kind", "pipeline"}
    why = "weights of another base or shape do not fit"
    if source == "checkpoint":
        fixed |= {"model.dtype", f"stages.{stage}.start_from", f"stages.{stage}.optimizer.name"}
        why = "the state in a checkpoint fits no other"
    free = {"tuning.dropout", f"stages.{stage}.tuning.dropout"}
    refused = [key for key in changes if is_below(key, frozenset(fixed)) and key not in free]
    return [
        f"{key}: {json.dumps(changes[key][0])} in {before.name} cannot become {json.dumps(changes[key][1])} in a fork from its {source}: {why}"
        + ("; --from artifact allows it" if source == "checkpoint" and "optimizer" in key else "")
        for key in refused
    ]


def _steps_left(
    files: StageFolder,
    found: checkpoints.VerifiedCheckpoint,
    config: RunConfig,
    name: str,
    changes: Mapping[str, tuple[JsonValue, JsonValue]],
) -> list[str]:
    stage = training_stages(config)[name]
    end = stage.max_steps
    lengths = {f"stages.{name}.{key}" for key in ("max_steps", "epochs")}
    if end is None and files.result.exists() and not lengths & changes.keys():
        end = int(read_json(files.result)["steps"])
    if end is None or found.step < end:
        return []
    return [
        f"the checkpoint is of step {found.step}, and training ends at step {end}: set stages.{name}.max_steps above {found.step}, take "
        "an earlier one with --step, or continue from the artifact with --from artifact"
    ]


def _artifact_problems(parent: RunFolder, before: RunConfig, config: RunConfig, name: str) -> list[str]:
    files = parent.stage(name)
    if proven_digest(files) is None:
        return [f"{name}: {files.artifact} is not there, or not what {files.result} proved; fork it --from checkpoint"]
    kind = made_kind(before, name)
    if kind not in start_kinds(config.stages[name]):
        return [
            f"{name}: a stage of kind {config.stages[name].kind} cannot start from its own artifact; fork it --from checkpoint"
        ]
    return []


def _accepting(
    config: RunConfig,
    found: checkpoints.VerifiedCheckpoint,
    name: str,
    changes: Mapping[str, tuple[JsonValue, JsonValue]],
) -> tuple[RunConfig, list[str]]:
    """The fork's configuration with every changed setting in `accept_changes`, which is how a resume accepts one."""
    stage = training_stages(config)[name]
    old, new = found.state["settings"], settings_that_matter(config, name)
    data = f"stages.{name}.data"
    changed = [key for key in sorted(old.keys() | new.keys()) if key != data and old.get(key) != new.get(key)]
    if any(is_below(key, frozenset({data, "seeds.split"})) for key in changes):
        changed = [*(key for key in changed if not is_below(key, frozenset({data}))), data]
    checkpoint: dict[str, Any] = {"accept_changes": tuple(dict.fromkeys([*stage.checkpoint.accept_changes, *changed]))}
    notes: list[str] = []
    same = frozenset(f"stages.{name}.{key}" for key in SAME_PROBE) | {"seeds.data"}
    if stage.checkpoint.probe_rows and not all(is_below(key, same) for key in changed):
        checkpoint["probe_rows"] = 0
        notes.append(
            f"stages.{name}.checkpoint.probe_rows=0: the stored loss belongs to the old settings and cannot be reproduced"
        )
    updates: dict[str, Any] = {"checkpoint": stage.checkpoint.model_copy(update=checkpoint)}
    if stage.pause_at_step is not None and stage.pause_at_step <= found.step:
        updates["pause_at_step"] = None
        notes.append(f"stages.{name}.pause_at_step=null: the checkpoint is past step {stage.pause_at_step}")
    stages = {**config.stages, name: stage.model_copy(update=updates)}
    return config.model_copy(update={"stages": stages}), notes


def _put(values: dict[str, JsonValue], key: str, value: JsonValue) -> dict[str, JsonValue]:
    head, _, rest = key.partition(".")
    if not rest:
        return {**values, head: value}
    below = values[head]
    assert isinstance(below, dict), "the configuration was valid when it was frozen"
    return {**values, head: _put(below, rest, value)}

"""Writes the folder of a fork: verified copies of what it starts from. Must not import torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.config.run import PARENT
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.files.atomic import os_sentence, read_json, write_json
from orchestrator.files.manifest import file_digest
from orchestrator.housekeeping.fork import Fork, proven_digest
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.freeze import all_or_nothing, check_writable
from orchestrator.run_state.frozen import load_frozen
from orchestrator.run_state.reuse import up_to_date_stages

LEFT_BEHIND = ("checkpoints", "quarantine", "logs", "wandb", "samples", "profile", "rollouts", "attempts")
"""Files copied from earlier stages: how they were trained, not what they produced."""


def write_fork(fork: Fork) -> None:
    """Write the whole run folder; only a complete one gets its final name."""
    final = fork.folder.root
    if final.exists():
        raise ConfigError(f"{final} exists already; choose another name=")
    staging = RunFolder(final.with_name(f".{final.name}.fork-{os.getpid()}"))
    with all_or_nothing(final.parent):
        check_writable(final)
        try:
            _fill(fork, staging)
            staging.root.rename(final)
        except OSError as error:
            raise RunFolderError(os_sentence(final, error)) from None
        finally:
            shutil.rmtree(staging.root, ignore_errors=True)


def _fill(fork: Fork, staging: RunFolder) -> None:
    position = fork.config.pipeline.index(fork.stage)
    earlier = [name for name in fork.config.pipeline[:position] if fork.parent.stage(name).result.exists()]
    for name in earlier:
        _copy_stage(fork.parent.stage(name).root, staging.stage(name).root, final=fork.folder.stage(name))
    if fork.checkpoint is None:
        _copy_artifact(fork.parent.stage(fork.stage), staging.stage(PARENT), final=fork.folder.stage(PARENT))
    else:
        _copy_checkpoints(fork, staging.stage(fork.stage))
    record: dict[str, Any] = dict(read_json(fork.parent.run))
    if added := load_frozen(fork.parent).added:
        record["added"] = dict(added)
    record |= {"orchestrator": __version__, "config": fork.config.model_dump(mode="json"), "parent": _origin(fork)}
    write_json(staging.run, record)
    stale = [name for name in earlier if name not in up_to_date_stages(fork.config, staging)]
    if stale:
        raise ConfigError(
            f"{stale[0]} is finished in {fork.parent.root}, and the change affects it; fork it with --stage {stale[0]}"
        )


def _origin(fork: Fork) -> dict[str, Any]:
    """The fork's origin, by digest, because the parent may move or vanish."""
    if fork.checkpoint is not None:
        digest = fork.checkpoint.manifest["manifest_sha256"]
    else:
        digest = proven_digest(fork.parent.stage(fork.stage))
    return {
        "name": fork.parent.root.name,
        "run_sha256": file_digest(fork.parent.run),
        "stage": fork.stage,
        "from": fork.source,
        "step": None if fork.checkpoint is None else fork.checkpoint.step,
        "manifest_sha256": digest,
        "changes": {key: list(values) for key, values in fork.changes.items()},
    }


def _copy_stage(source: Path, target: Path, *, final: StageFolder) -> None:
    shutil.copytree(source, target, ignore=lambda folder, _: LEFT_BEHIND if Path(folder) == source else ())
    _own(StageFolder(target), final)


def _copy_artifact(source: StageFolder, target: StageFolder, *, final: StageFolder) -> None:
    target.root.mkdir(parents=True)
    shutil.copytree(source.artifact, target.artifact)
    shutil.copyfile(source.result, target.result)
    _own(target, final)


def _own(files: StageFolder, final: StageFolder) -> None:
    """The copied result names the copied artifact."""
    result = read_json(files.result)
    write_json(files.result, {**result, "artifact": {**result["artifact"], "path": str(final.artifact)}})


def _copy_checkpoints(fork: Fork, target: StageFolder) -> None:
    """Copy the checkpoint, and the earlier best one if early stopping may return to it; each copy is verified."""
    assert fork.checkpoint is not None
    source, step = fork.parent.stage(fork.stage), fork.checkpoint.step
    best = fork.checkpoint.state["progress"]["stopping"]["best_step"]
    target.checkpoints.mkdir(parents=True)
    for wanted in {step, *([best] if best in checkpoints.saved_steps(source) and best < step else [])}:
        shutil.copytree(source.checkpoint(wanted), target.checkpoint(wanted))
        checkpoints.verify(target.checkpoint(wanted))
    if source.rollbacks.exists():
        shutil.copyfile(source.rollbacks, target.rollbacks)

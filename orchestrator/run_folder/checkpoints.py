"""Checkpoints as folders: which are valid, moved aside, or expired. Must not import torch."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import publish, read_json, sync_folder, write_json
from orchestrator.files.manifest import MANIFEST, read_manifest
from orchestrator.run_folder.folder import StageFolder

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")

Tell = Callable[..., None]
"""tell(event, **facts): appends to events.jsonl."""


@dataclass(frozen=True, kw_only=True)
class VerifiedCheckpoint:
    """A checkpoint whose files all match its manifest."""

    step: int
    folder: Path
    manifest: dict[str, Any]

    @property
    def world_size(self) -> int:
        return self.manifest["world_size"]

    @property
    def rank_files(self) -> list[Path]:
        """The files of the ranks that wrote it, in rank order."""
        return [self.folder / rank_file(rank) for rank in range(self.world_size)]

    @property
    def state(self) -> dict[str, Any]:
        """State of the run as a whole, written by rank 0."""
        return json.loads((self.folder / STATE).read_text(encoding="utf-8"))


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def saved_steps(folder: StageFolder) -> list[int]:
    """Steps of all checkpoints, valid or not, oldest first."""
    names = [_NAME.fullmatch(path.name) for path in folder.checkpoints.glob("step-*")]
    return sorted(int(name[1]) for name in names if name is not None)


def newest_valid(
    folder: StageFolder, *, read_files: bool = True
) -> tuple[VerifiedCheckpoint | None, dict[int, list[str]]]:
    """The checkpoint that a resume would take, and the problems of each newer one. Read-only.

    Without `read_files` only the manifests are checked, which is fast for large checkpoints.
    """
    refused: dict[int, list[str]] = {}
    for step in reversed(saved_steps(folder)):
        try:
            return verify(folder.checkpoint(step), share=slice(None if read_files else 0)), refused
        except CheckpointError as error:
            refused[step] = list(error.problems)
    return None, refused


def verify(folder: Path, *, share: slice = slice(None)) -> VerifiedCheckpoint:
    """Compare a checkpoint (or a share of its files) with its manifest, byte for byte; CheckpointError names every
    difference.
    """
    _check_manifest(folder)
    manifest = read_manifest(folder, share=share)
    return VerifiedCheckpoint(step=manifest["step"], folder=folder, manifest=manifest)


def describe(found: VerifiedCheckpoint) -> str:
    """What a resume from a checkpoint restores, in a sentence."""
    facts = found.manifest
    size = sum(entry["bytes"] for entry in facts["files"].values())
    saved = datetime.fromtimestamp(facts["created"]).strftime("%Y-%m-%d %H:%M")
    return (
        f"step {found.step}, saved {saved} by attempt {facts['attempt']} on {found.world_size} ranks under sharding={facts['sharding']} "
        f"({size / (1 << 20):,.1f} MiB): weights, optimizer, random states, position in the data and schedule"
    )


def commit(temporary: Path, final: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of files that are already on disk, and give the folder its final name."""
    manifest = {"format": FORMAT, **facts, "files": dict(files)}
    write_json(temporary / MANIFEST, {**manifest, "manifest_sha256": digest_of(manifest)})
    sync_folder(temporary)
    publish(temporary, final)


def quarantine(folder: StageFolder, step: int, why: Sequence[str], tell: Tell) -> None:
    """Move a checkpoint aside, under an unused name; nothing is deleted."""
    folder.quarantine.mkdir(parents=True, exist_ok=True)
    source = folder.checkpoint(step)
    number = 1 + sum(1 for _ in folder.quarantine.glob(f"{source.name}*"))
    place = folder.quarantine / f"{source.name}.{number}"
    source.rename(place)
    sync_folder(folder.checkpoints)
    tell("quarantine", step=step, why=list(why), moved_to=str(place))


def best_step(folder: StageFolder) -> int | None:
    """The saved step with the lowest held-out loss of those that were evaluated at their own step."""
    losses: dict[int, float] = {}
    for step in saved_steps(folder):
        loss = read_json(folder.checkpoint(step) / MANIFEST)["eval_loss"]
        if loss is not None:
            losses[step] = loss
    return min(losses, key=lambda step: (losses[step], step)) if losses else None


def expired_steps(steps: Sequence[int], *, keep_last: int, keep_every: int | None, best: int | None) -> list[int]:
    """Steps that retention expires: all but the newest `keep_last`, the multiples of `keep_every` and the best."""
    kept = set(sorted(steps)[-keep_last:])
    if keep_every is not None:
        kept |= {step for step in steps if step % keep_every == 0}
    return sorted(step for step in steps if step not in kept and step != best)


def delete(folder: StageFolder, steps: Iterable[int]) -> None:
    """Delete checkpoints; rename first, so that no partial folder is ever seen under the name."""
    for step in steps:
        leaving = folder.checkpoints / f".{folder.checkpoint(step).name}.deleted"
        shutil.rmtree(leaving, ignore_errors=True)
        folder.checkpoint(step).rename(leaving)
        sync_folder(folder.checkpoints)
        shutil.rmtree(leaving, ignore_errors=True)


def recover_interrupted_save(folder: StageFolder) -> None:
    """Recover from an interrupted save: restore the checkpoint being replaced, delete partial ones."""
    for path in folder.checkpoints.glob(".step-*"):
        name = _NAME.match(path.name[1:])
        final = folder.checkpoint(int(name[1])) if name is not None else None
        if path.name.endswith(".old") and final is not None and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _check_manifest(folder: Path) -> None:
    """Raise CheckpointError unless the manifest is consistent with itself, the folder's name and the number of
    ranks.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; it was never finished")
    try:
        manifest: Any = json.loads(path.read_bytes())
        content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        intact = manifest["manifest_sha256"] == digest_of(content)
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{path} is damaged or empty") from None
    if not intact:
        raise CheckpointError(f"{path}: it does not agree with its own sha256")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
    problems: list[str] = []
    if folder.name != f"step-{manifest['step']:08d}":
        problems.append(f"{folder}: it holds step {manifest['step']}")
    ranks = manifest["world_size"]
    wanted = {rank_file(rank) for rank in range(ranks)} | {STATE}
    problems += [
        f"{folder}: {name} is not in the manifest, {ranks} ranks wrote it"
        for name in sorted(wanted - manifest["files"].keys())
    ]
    problems += [
        f"{folder}: {name} is in the manifest, {ranks} ranks wrote it"
        for name in sorted(manifest["files"].keys() - wanted)
    ]
    if problems:
        raise CheckpointError(problems)


def digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

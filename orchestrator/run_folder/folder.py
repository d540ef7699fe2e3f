"""The only module that knows file names inside a run; atomic writes and manifests. Must not import torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.base import JsonValue
from orchestrator.errors import CheckpointError, RunFolderError

MANIFEST = "MANIFEST.json"
MEASURED = "measured.json"
PREPARATION = "prepare"
"""Name of the job that prepares the data of a run; no stage may have it."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
ELSEWHERE = "set output_dir to a folder of yours"


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    root: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def phases(self) -> Path:
        """What the newest attempt is doing; overwritten all the time, and no part of the record."""
        return self.root / "phases.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """Checkpoints that failed their proof."""
        return self.root / "quarantine"

    @property
    def rollbacks(self) -> Path:
        """Which data rollbacks took out, and how many there were."""
        return self.root / "rollbacks.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def artifact(self) -> Path:
        return self.root / "artifact"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def measured(self) -> Path:
        """How fast the stage was, for the next plan."""
        return self.root / MEASURED

    @property
    def stop(self) -> Path:
        """Its existence asks the job to save and end."""
        return self.root / "STOP"

    @property
    def prepared(self) -> Path:
        """Names the prepared data that the ranks map."""
        return self.root / "prepared.json"

    @property
    def proof(self) -> Path:
        """What the re-opened artifact said."""
        return self.root / "proof.json"

    @property
    def samples(self) -> Path:
        """The rows that each rank took at each step, one file a rank."""
        return self.root / "samples"

    @property
    def curves(self) -> Path:
        """Scores of every blend of an interpolation or a soup; its picture has the suffix .png."""
        return self.root / "curves.json"

    @property
    def reference(self) -> Path:
        """Log-probabilities under the policy that the stage started from, one file a set of rows."""
        return self.root / "reference"

    @property
    def rollouts(self) -> Path:
        """The newest completions that a policy was trained on, whole."""
        return self.root / "rollouts"

    @property
    def generated(self) -> Path:
        """Completions for people to read, with their rewards."""
        return self.root / "samples.jsonl"

    @property
    def submission(self) -> Path:
        """Token and job id of the newest submission to Slurm."""
        return self.root / "submission.json"

    @property
    def jobs(self) -> Path:
        """Every Slurm job that has worked on the stage, one id a line; the job's script appends to it."""
        return self.logs / "jobs"

    @property
    def script(self) -> Path:
        """The script of the job that prepares data; those of the stages lie in scripts/."""
        return self.root / "job.sbatch"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def deepspeed(self) -> Path:
        """The dict that DeepSpeed got."""
        return self.root / "deepspeed.json"

    @property
    def profile(self) -> Path:
        """Traces and breakdowns of `profile=true`."""
        return self.root / "profile"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number}.json"

    def open_attempts(self) -> list[int]:
        """Attempts that were begun and whose end is not on record."""
        begun = [path.name.removeprefix("attempt-") for path in self.logs.glob("attempt-*")]
        return sorted(int(number) for number in begun if number.isdigit() and not self.attempt(int(number)).exists())

    def fault(self, attempt: int, rank: int) -> Path:
        """Where a rank leaves its own cause of death; the earliest one of an attempt is the first cause."""
        return self.attempts / f"{attempt}.fault-{rank}.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_partial(self, step: int) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.checkpoints / f".step-{step:08d}.partial"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def location(self) -> Path:
        """Where the folder was when a command last wrote into it; tells a copy from its original."""
        return self.root / "location.json"

    @property
    def lock(self) -> Path:
        """Held while a command looks whether a stage runs, and starts it."""
        return self.root / ".start.lock"

    @property
    def superseded(self) -> Path:
        """Stages that were run anew, as they were."""
        return self.root / "superseded"

    @property
    def scripts(self) -> Path:
        return self.root / "scripts"

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.root / name)


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunFolderError with the path where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(f"{path} is missing") from None
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from None


def read_result(folder: StageFolder) -> dict[str, Any]:
    """result.json, with what it names of the stage's own files at the place where the folder is now."""
    result = read_json(folder.result)
    own = {"curves": str(folder.curves)} if "curves" in result else {}
    return {**result, **own, "artifact": {**result["artifact"], "path": str(folder.artifact)}}


def write_json(path: Path, value: JsonValue | Mapping[str, Any]) -> None:
    """Writes atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Writes beside the final name, fsyncs, renames: a reader sees the old or the new text, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(os_sentence(path, error)) from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def os_sentence(path: Path, error: OSError, *, advice: str = ELSEWHERE) -> str:
    """Why a file cannot be written, and the way out."""
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(existing_parent(path)).free
        return (
            f"{path}: the disk is full ({free / 2**20:.0f} MiB free); free some space or set output_dir to another disk"
        )
    if error.errno in NO_PERMISSION:
        return f"{path}: no permission to write there; {advice}"
    return f"{path}: {error.strerror or error}"


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(parent for parent in [path, *path.parents] if parent.exists())


def free_bytes(path: Path) -> int:
    """Space left on the file system that a path is on, or will be."""
    return shutil.disk_usage(existing_parent(path)).free


# ---- manifests -----------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Fsyncs every file of a folder and writes size and sha256 of each, with `facts`, as its last file."""
    files = {str(file.relative_to(folder)): file for file in _files(folder)}
    entries = {name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for name, file in files.items()}
    for file in files.values():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    write_json(folder / MANIFEST, {**facts, "files": entries})


def read_manifest(folder: Path, *, share: slice = slice(None)) -> dict[str, Any]:
    """The manifest after every file (of a share of them) was compared with it; CheckpointError names each difference."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; it was never finished")
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged") from None
    problems = [problem for name in sorted(entries)[share] for problem in _file_problems(folder / name, entries[name])]
    if problems or not entries:
        raise CheckpointError(problems or f"{path} lists no file")
    return manifest


def _file_problems(path: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: missing"
    elif path.stat().st_size != entry["bytes"]:
        yield f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written"
    elif file_digest(path) != entry["sha256"]:
        yield f"{path}: its sha256 is not the one that was written"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder to its final name; an older one there is removed only after it was moved aside."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def flatten(tree: JsonValue, prefix: str = "") -> dict[str, JsonValue]:
    """Dotted keys of the leaves."""
    if isinstance(tree, dict) and tree:
        return {key: leaf for name, value in tree.items() for key, leaf in flatten(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}

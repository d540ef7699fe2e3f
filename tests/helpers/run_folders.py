"""Writes run folders as a job leaves them, without training: for commands that read or remove runs. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.composition.compose import compose
from orchestrator.files.atomic import write_json
from orchestrator.files.manifest import MANIFEST, file_digest, write_manifest
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import RunFolder, StageFolder

DIGESTS = {"base": "b1", "tokenizer": "t1", "template": "c1", "code": "1", "data": "d1"}


def write_run(root: Path, name: str, *words: str) -> RunFolder:
    """A run of one sft stage that has not started."""
    folder = RunFolder(root / name)
    config = _composed(words) | {"name": name, "output_dir": str(root)}
    write_json(folder.run, {"orchestrator": "0", "config": config})
    return folder


@cache
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    return compose(["+experiment=llama_lora", "tracking=none", *words]).model_dump(mode="json")


def write_training(files: StageFolder, losses: Sequence[float], *, evaluations: Mapping[int, float]) -> None:
    """The record of a first attempt: a row per step, and the evaluations by step."""
    files.root.mkdir(parents=True, exist_ok=True)
    scored = [
        {"step": step, "attempt": 1, "eval_loss": loss, "time": 10.0 + step} for step, loss in evaluations.items()
    ]
    trained = [
        {"step": step, "attempt": 1, "loss": loss, "lr": 1e-3 / step, "tokens_per_second": 100.0, "step_seconds": 1.0,
         "num_steps": 1, "memory_gib": 0.5, "time": 10.0 + step}
        for step, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    rows = sorted([*scored, *trained], key=lambda row: float(str(row["step"])))
    files.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [{"event": "start", "attempt": 1, "time": 10.0}, {"event": "train", "attempt": 1, "time": 10.0, "step": 0}]
    events[1]["steps"] = len(losses)
    files.events.write_text("".join(json.dumps(row) + "\n" for row in events))


def finish(files: StageFolder, *, digests: Mapping[str, str] = DIGESTS, **more: Any) -> None:
    """Write a proven artifact and its result."""
    files.artifact.mkdir(parents=True, exist_ok=True)
    (files.artifact / "adapter_model.safetensors").write_bytes(b"weights")
    write_manifest(files.artifact, {"stage": files.root.name})
    manifest = file_digest(files.artifact / MANIFEST)
    result = {
        "stage": files.root.name,
        "kind": "sft",
        "steps": 4,
        "tokens": 400,
        "eval_loss_before": 2.0,
        "eval_loss_after": 1.0,
        "seconds": 4.0,
        "tokens_per_second": 100.0,
        "digests": dict(digests),
        "artifact": {"kind": "adapter", "path": str(files.artifact), "manifest_sha256": manifest},
        "base": {"name": "base", "folder": "base"},
        "proof": {"loss": 1.0, "reopened_loss": 1.0, "rows": 4},
        "wandb": None,
    }
    write_json(files.result, result | more)


def stop(files: StageFolder, *, state: str = "stopped", why: str = "SIGINT", step: int = 2) -> None:
    """The record of an attempt that ended without a result."""
    attempt = {
        "attempt": 1,
        "state": state,
        "why": why,
        "host": "here",
        "rank": 0,
        "exit_code": 75,
        "step": step,
        "time": 20.0,
    }
    write_json(files.attempt(1), attempt)


def write_checkpoint(files: StageFolder, step: int, *, settings: Mapping[str, Any] | None = None) -> Path:
    """A proven checkpoint of one rank, with a state like the trainer's."""
    folder = files.checkpoint(step)
    folder.mkdir(parents=True)
    (folder / checkpoints.rank_file(0)).write_bytes(bytes(1000))
    state = {
        "settings": dict(settings or {}),
        "progress": {"step": step, "stopping": {"best_step": None}},
        "best": None,
    }
    write_json(folder / checkpoints.STATE, state)
    names = (checkpoints.rank_file(0), checkpoints.STATE)
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in names}
    facts = {
        "format": checkpoints.FORMAT, "step": step, "tokens": 100, "world_size": 1, "sharding": "none", "attempt": 1,
        "created": 1e9, "best_step": None, "eval_loss": None, "files": entries,
    }  # fmt: skip
    write_json(folder / MANIFEST, facts | {"manifest_sha256": checkpoints.digest_of(facts)})
    return folder

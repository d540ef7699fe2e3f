"""Decides which finished stages are still valid, and moves the others aside. Must not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config.base import JsonValue
from orchestrator.config.pipeline import inputs_of
from orchestrator.config.run import PARENT, RunConfig
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.content_digests import changed_content
from orchestrator.run_state.resume_rules import settings_that_matter


def stage_digest(config: RunConfig, name: str, inputs: Mapping[str, str]) -> str:
    """The identity of a stage's result: its settings with the base, and the digests of the artifacts it reads."""
    settings: dict[str, JsonValue] = settings_that_matter(config, name)
    facts: dict[str, Any] = {"settings": settings, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def up_to_date_stages(config: RunConfig, run: RunFolder) -> tuple[str, ...]:
    """The finished stages that are still valid: settings, base, data files and the artifacts they read are
    unchanged.
    """
    artifacts: dict[str, str] = {}
    origin = run.stage(PARENT).result
    if origin.exists():
        artifacts[PARENT] = read_json(origin)["artifact"]["manifest_sha256"]
    for name in config.pipeline:
        inputs = inputs_of(config, name)
        file = run.stage(name).result
        if not file.exists() or any(source not in artifacts for source in inputs):
            continue
        result = read_json(file)
        wanted = stage_digest(config, name, {source: artifacts[source] for source in inputs})
        if result.get("digest") in (None, wanted) and not changed_content(config, run, name):
            artifacts[name] = result["artifact"]["manifest_sha256"]
    return tuple(name for name in artifacts if name != PARENT)


def rerunnable_keys(config: RunConfig, run: RunFolder) -> frozenset[str]:
    """Keys of stages that may change because the pipeline then reruns them: finished ones, and those without progress
    to lose.
    """
    if len(config.pipeline) < 2:
        return frozenset()
    stages = {name: run.stage(name) for name in config.stages}
    return frozenset(
        f"stages.{name}"
        for name, files in stages.items()
        if files.result.exists() or not (files.checkpoints.is_dir() and any(files.checkpoints.iterdir()))
    )


def move_superseded(run: RunFolder, names: Sequence[str]) -> list[str]:
    """Move the folders of stages that are run again below superseded/; return a sentence for each."""
    messages: list[str] = []
    for name in names:
        folder = run.stage(name).root
        if not folder.is_dir():
            continue
        taken = len(list(run.superseded.glob(f"{name}-*"))) if run.superseded.is_dir() else 0
        target = run.superseded / f"{name}-{taken + 1}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        messages.append(f"{name}: is rerun; its previous files are in {target}")
    return messages

"""The inputs of one attempt at a stage. Must not import torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from orchestrator.config.run import RunConfig, Stage
from orchestrator.config.training import TrainingStage
from orchestrator.metrics.phases import Phases
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_folder.stop_request import StopRequest
from orchestrator.run_state.artifact_kind import ArtifactKind


@dataclass(frozen=True, kw_only=True)
class ParentArtifact:
    """The proven artifact of an earlier stage."""

    stage: str
    folder: Path
    kind: ArtifactKind


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """One attempt at one stage."""

    config: RunConfig
    name: str
    stage: Stage
    folder: StageFolder
    run_file: Path
    attempt: int
    stop: StopRequest
    base_folder: Path
    """Local folder of the base model."""
    start: ParentArtifact | None = None
    """The artifact to start from, unless it is the bare base."""
    train_data: Path
    evaluation_data: Path | None
    """Prepared data."""
    other_models: Sequence[ParentArtifact] = ()
    """Further artifacts that an interpolation or a soup blends with `start`."""
    sets: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Prepared data of the further sets that a stage scores, by name."""
    rewards: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Folders of the reward stages that this one reads, by the stage's name."""
    digest: str = ""
    """Digest of everything that decides the stage's result."""
    began: float = field(default_factory=time.time)
    """Start time of this process: imports and fetching inputs count as start-up."""
    phases: Phases = field(default_factory=Phases)
    """Where this attempt reports its current phase."""
    input_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    """Digests of the artifacts that the stage reads, by stage."""
    content_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    """Digests of base, tokenizer, template, data files and code."""


def training_stage(context: StageContext) -> TrainingStage:
    """The stage of an attempt that trains, as its type."""
    return cast("TrainingStage", context.stage)

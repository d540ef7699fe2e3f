"""The model of a finished run, opened from Python for notebooks and scripts."""

from __future__ import annotations

from functools import partial

import torch
from transformers import AutoTokenizer

from orchestrator.classification.model import open_classifier
from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import read_manifest
from orchestrator.models.artifact import open_artifact
from orchestrator.models.loading import DTYPES, silence_libraries
from orchestrator.models.stage_inputs import find_base_folder
from orchestrator.models.weight_stream import placed_on
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.frozen import load_config
from orchestrator.run_state.opened_model import OpenedModel


def open_run(run: RunFolder, stage: str | None) -> OpenedModel:
    """Open the artifact of a stage, by default the last that made a model; its files must be the proven ones."""
    config = load_config(run)
    name = _stage_with_model(run, config, stage)
    files = run.stage(name)
    kind = ArtifactKind(read_json(files.result)["artifact"]["kind"])
    read_manifest(files.artifact)
    base_folder = find_base_folder(config, run, name)
    silence_libraries()
    own = config.for_stage(name)
    open_it = open_classifier if kind.is_classifier else partial(open_artifact, scores=kind.is_reward)
    device = torch.device("cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu")
    with placed_on(device):
        model = open_it(
            files.artifact,
            base_folder=base_folder,
            config=own,
            weights_dtype=DTYPES[own.model.dtype],
            packed=False,
        )
    tokenizer = AutoTokenizer.from_pretrained(str(files.artifact))
    return OpenedModel(model=model.to(device).eval(), tokenizer=tokenizer, stage=name, kind=kind, config=own)


def _stage_with_model(run: RunFolder, config: RunConfig, stage: str | None) -> str:
    """The stage to open. ConfigError if it is unknown, unfinished or made no model."""
    kinds = {
        name: ArtifactKind(read_json(run.stage(name).result)["artifact"]["kind"])
        for name in config.pipeline
        if run.stage(name).result.exists()
    }
    models = [name for name, kind in kinds.items() if kind.is_adapter or kind.is_whole_model]
    chosen = stage or (models[-1] if models else None)
    if chosen not in models:
        given = f"stage {stage}" if stage else str(run.root)
        raise ConfigError(
            f"{given}: no finished stage with a model; those of this run are {', '.join(models) or 'none'}"
        )
    return chosen

"""The end of an interpolation or a soup: write the chosen blend, score it, and leave it to its proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from orchestrator.classification.classes import read_classes
from orchestrator.classification.objective import labelled_objective
from orchestrator.classification.report import proof_rows
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.run import makes_classifier
from orchestrator.data.prepared.meta import read_meta
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.merging.blend import Blend, open_blend
from orchestrator.metrics import phases as phase
from orchestrator.models.artifact import ArtifactFacts, write_artifact
from orchestrator.models.loading import DTYPES
from orchestrator.run_state.proof_note import Expected, write_note
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import ParentArtifact, StageContext
from orchestrator.run_state.stage_result import artifact_kind
from orchestrator.training.evaluation import evaluate
from orchestrator.training.finish import leave_for_proof
from orchestrator.training.objectives import proof_objective

PROOF_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Share:
    """An ingredient and its weight in a blend."""

    ingredient: ParentArtifact
    weight: float


def finish_blend(
    context: StageContext, runtime: Runtime, record: Recorder, shares: Sequence[Share], *, summary: Mapping[str, Any]
) -> int:
    """Rebuild the blend from the ingredients with weight in it, write and score it; every rank must call it."""
    context.phases.begin(phase.WRITING, unit=phase.ROWS)  # it is scored once more, as the proof will score it
    used = [share for share in shares if share.weight] or list(shares[:1])
    blend = open_blend(context, [share.ingredient for share in used])
    blend.put([share.weight for share in used])
    _write(context, runtime, blend, used, record)
    expected = _expected(context, runtime, blend.model)
    if runtime.is_main:
        kind, world_size = artifact_kind(context), runtime.world_size
        write_note(context, expected, kind=kind, summary=summary, world_size=world_size)
    return leave_for_proof(context, runtime, record)


def _write(context: StageContext, runtime: Runtime, blend: Blend, used: Sequence[Share], record: Recorder) -> None:
    config = context.config
    is_whole = not config.tuning.is_adapter
    facts = {
        "run": config.name,
        "stage": context.name,
        "kind": context.stage.kind,
        "tuning": config.tuning.method,
        "base": config.model.base,
        "format": read_meta(context.train_data).format,
        "blend": {share.ingredient.stage: share.weight for share in used},
    }
    is_base = not is_whole and not any(share.weight for share in used)
    if is_base:
        record.log("warning: the chosen blend is the base itself; the adapter that is written changes nothing")
    about = ArtifactFacts(config=config, base_folder=context.base_folder, manifest=facts)
    write_artifact(runtime, blend.parameters(runtime), context.folder.artifact, about, is_trained=not is_base)


def _expected(context: StageContext, runtime: Runtime, model: torch.nn.Module) -> Expected:
    """What the proof must reproduce, scored in the proof's way: all in `model.dtype`. Every rank must call it."""
    config, stage = context.config, cast("ScoringStage", context.stage)
    if config.quantization.scheme == "none":
        model.to(DTYPES[config.model.dtype])
    rows = PreparedRows.open(context.train_data)
    limit = min(stage.rows, PROOF_ROWS)
    if makes_classifier(config, context.name):
        objective = labelled_objective(runtime, read_classes(context.folder.artifact), rows)
        limit = proof_rows(objective, rows, limit)
    else:
        objective = proof_objective(runtime, stage, rows.meta.kind)
    held = runtime.hold(model)
    scored = evaluate(runtime, held, objective, rows, micro_size=stage.micro_size, limit=limit)
    return Expected(
        data=context.train_data, rows=scored.rows, loss=scored.loss, micro_size=stage.micro_size, autocast=False
    )

"""The end of an interpolation or a soup: write the chosen blend, prove it in a fresh process, then write the result."""

from __future__ import annotations

import gc
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
from orchestrator.files.atomic import write_json
from orchestrator.merging.blend import open_blend
from orchestrator.metrics import phases as phase
from orchestrator.models.artifact import adapter_names, check_tensors, write_artifact
from orchestrator.models.loading import DTYPES
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import ParentArtifact, StageContext
from orchestrator.training.evaluation import evaluate
from orchestrator.training.finish import artifact_kind, finish_scoring, prove_in_fresh_process
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
    """Rebuild the blend from the ingredients with weight in it, write, prove and report; return the exit code."""
    context.phases.begin(phase.WRITING, unit=phase.ROWS)  # it is scored once more, as the proof will score it
    used = [share for share in shares if share.weight] or list(shares[:1])
    blend = open_blend(context, [share.ingredient for share in used])
    blend.put([share.weight for share in used])
    _write(context, blend.model, used, record)
    _write_expectation(context, runtime, blend.model)
    del blend
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    prove_in_fresh_process(context)
    return finish_scoring(context, record, dict(summary), kind=artifact_kind(context))


def _write(context: StageContext, model: torch.nn.Module, used: Sequence[Share], record: Recorder) -> None:
    config = context.config
    is_whole = not config.tuning.is_adapter
    weights = {
        name: parameter.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if is_whole or ".lora_" in name
    }
    facts = {
        "run": config.name,
        "stage": context.name,
        "kind": context.stage.kind,
        "tuning": config.tuning.method,
        "base": config.model.base,
        "format": read_meta(context.train_data).format,
        "blend": {share.ingredient.stage: share.weight for share in used},
    }
    write_artifact(model, weights, context.folder.artifact, base_folder=context.base_folder, config=config, facts=facts)
    if is_whole or any(share.weight for share in used):
        check_tensors(context.folder.artifact, adapter_names(model, weights, config))
    else:
        record.log("warning: the chosen blend is the base itself; the adapter that is written changes nothing")


def _write_expectation(context: StageContext, runtime: Runtime, model: torch.nn.Module) -> None:
    """Write what the proof must reproduce, scored in the proof's way: all in `model.dtype`."""
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
    model.to(runtime.device).eval()
    scored = evaluate(runtime, model, objective, rows, micro_size=stage.micro_size, limit=limit)
    expectation = {
        "data": str(context.train_data),
        "rows": scored.rows,
        "loss": scored.loss,
        "micro_size": stage.micro_size,
        "autocast": False,
        "base_folder": str(context.base_folder),
    }
    write_json(context.folder.proof, expectation)

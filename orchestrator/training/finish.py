"""The end of a stage: write the artifact, prove it in a fresh process, and only then write result.json."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import torch

from orchestrator.config.run import makes_classifier
from orchestrator.data.prepared.meta import read_meta
from orchestrator.distributed.gather import gather_frozen, gather_trainable
from orchestrator.errors import EXIT_DONE, CheckpointError
from orchestrator.files.atomic import read_json, write_json, write_text
from orchestrator.files.manifest import MANIFEST, file_digest
from orchestrator.machine.process_group import without_rank
from orchestrator.metrics import phases as phase
from orchestrator.metrics.jsonl import read_rows
from orchestrator.metrics.speed import run_speed
from orchestrator.models.artifact import CARD, adapter_names, check_tensors, round_as_saved, write_artifact
from orchestrator.models.peft_adapters import plain_lora
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.goodput import time_spent
from orchestrator.run_state.model_card import artifact_card
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext, training_stage
from orchestrator.training.evaluation import Evaluation
from orchestrator.training.loop_state import Progress
from orchestrator.training.recipe import Recipe, Session


def finish_stage(
    session: Session,
    recipe: Recipe,
    record: Recorder,
    progress: Progress,
    *,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> int:
    """Write, prove and report on rank 0; every rank must call it. Raises CheckpointError if the proof fails."""
    context, runtime = session.context, session.runtime
    is_rounded = round_as_saved(session.model, context.config)
    known = after.first if recipe.is_proof_scored and after is not None and not is_rounded else None
    scored = recipe.proof() if known is None else known
    weights = gather_trainable(runtime, session.model)
    if context.config.tuning.freezes_parts:  # the artifact is a whole model
        weights |= gather_frozen(runtime, session.model)
    context.phases.begin(phase.WRITING)
    if runtime.is_main:
        _write(session, weights, step=progress.stopping.best_step or progress.step)
        _write_expectation(session, scored)
    summary = _summary(context, progress, before, after, seconds) | dict(recipe.summary() if runtime.is_main else {})
    # The proof loads the model again on the same device: the trainer's memory must be free by then.
    del session, recipe, weights
    gc.collect()
    runtime.end()
    if runtime.is_main:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        prove_in_fresh_process(context)
        _report(context, record, summary)
    return EXIT_DONE


def _write(session: Session, weights: Mapping[str, torch.Tensor], *, step: int) -> None:
    context = session.context
    module = cast("torch.nn.Module", session.runtime.accelerator.unwrap_model(session.model))
    tuning = context.config.tuning
    if tuning.is_pissa:
        weights = plain_lora(module, weights)
    facts = {
        "run": context.config.name,
        "stage": context.name,
        "kind": context.stage.kind,
        "step": step,
        "tuning": context.config.tuning.method,
        "base": context.config.model.base,
        "data": session.rows.digest,
        "format": session.rows.meta.format,
    }
    write_artifact(
        module, weights, context.folder.artifact, base_folder=context.base_folder, config=context.config, facts=facts
    )
    check_tensors(context.folder.artifact, adapter_names(module, weights, context.config))


def _write_expectation(session: Session, scored: Evaluation) -> None:
    """Write what the proof must reproduce: the trainer's own loss on held-out rows, or on the first training rows."""
    context = session.context
    expectation = {
        "data": str(context.evaluation_data or context.train_data),
        "rows": scored.rows,
        "loss": scored.loss,
        "micro_size": training_stage(context).batch.micro_size,
        "autocast": session.runtime.autocast_dtype is not None,
        "base_folder": str(context.base_folder),
    }
    write_json(context.folder.proof, expectation)


def prove_in_fresh_process(context: StageContext) -> None:
    """Run `orchestrator.evaluation.artifact_proof`, which sees nothing but the files."""
    environment = without_rank(os.environ)
    argv = [
        sys.executable,
        "-m",
        "orchestrator.evaluation.artifact_proof",
        str(context.run_file),
        "--stage",
        context.name,
    ]
    with context.phases.handed_over(phase.PROOF):
        done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, check=False)
    proof = read_json(context.folder.proof)
    if done.returncode != 0 or "reopened_loss" not in proof:
        raise CheckpointError(
            proof.get("problems") or f"{context.folder.artifact}: the proof ended with exit code {done.returncode}"
        )


def _summary(
    context: StageContext, progress: Progress, before: Evaluation | None, after: Evaluation | None, seconds: float
) -> dict[str, Any]:
    first = before.loss if before is not None else _recorded_first_loss(context)
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "eval_loss_before": first,
        "eval_loss_after": after.loss if after is not None else None,
        "best_step": progress.stopping.best_step,
        "stopped_early_at": progress.step if progress.stopping.is_over else None,
        "seconds": seconds,
    }


def finish_scoring(context: StageContext, record: Recorder, summary: dict[str, Any], *, kind: ArtifactKind) -> int:
    """Finish a stage that trains nothing: write its result, last of all."""
    manifest = context.folder.artifact / MANIFEST
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    wandb_state = record.finish(numbers, outcome="finished")
    result = {
        "stage": context.name,
        "kind": context.stage.kind,
        "attempt": context.attempt,
        **summary,
        **_times(context),
        "digest": context.digest,
        "digests": dict(context.content_digests),
        "inputs": dict(context.input_digests),
        "artifact": {"kind": kind, "path": context.folder.artifact.name, "manifest_sha256": file_digest(manifest)},
        "base": {"name": context.config.model.base, "folder": str(context.base_folder)},
        "wandb": wandb_state,
    }
    context.phases.end()
    record.event("finish", step=0)
    _write_card(context, result)
    # The order matters: result.json comes last of all, because without it the stage is not done.
    record.close_attempt("finished", "the artifact was proven", exit_code=EXIT_DONE)
    write_json(context.folder.result, result)
    record.log(json.dumps(result, indent=2, ensure_ascii=False))
    return EXIT_DONE


def _times(context: StageContext) -> dict[str, Any]:
    """Seconds of this attempt by phase, and in total; `seconds` is the training alone."""
    by_phase = context.phases.seconds()
    return {"phase_seconds": by_phase, "attempt_seconds": round(time.time() - context.began, 2)}


def artifact_kind(context: StageContext) -> ArtifactKind:
    """The kind of the artifact that a training or blending stage makes."""
    what = "adapter" if context.config.tuning.is_adapter else "model"
    if makes_classifier(context.config, context.name):
        return ArtifactKind(f"classifier_{what}")
    return ArtifactKind(f"reward_{what}" if context.stage.makes == "reward model" else what)


def _write_card(context: StageContext, result: Mapping[str, Any]) -> None:
    """Write the artifact's README.md; a merged folder has its own card, and a report is not a model."""
    if result["artifact"]["kind"] in (ArtifactKind.MERGED, ArtifactKind.REPORT):
        return
    held_out = context.evaluation_data
    card = artifact_card(
        context.config,
        context.name,
        result,
        folder=context.folder.artifact,
        train=read_meta(context.train_data),
        held_out=None if held_out is None else read_meta(held_out),
    )
    write_text(context.folder.artifact / CARD, card)


def _recorded_first_loss(context: StageContext) -> float | None:
    losses = [
        row["eval_loss"] for row in read_rows(context.folder.metrics) if row.get("step") == 0 and "eval_loss" in row
    ]
    return losses[0] if losses and isinstance(losses[0], float) else None


def _goodput(context: StageContext) -> dict[str, Any] | None:
    """How the wall-clock time of all attempts was spent."""
    spent = time_spent(context.folder)
    return None if spent is None else spent.to_json()


def _report(context: StageContext, record: Recorder, summary: dict[str, Any]) -> None:
    proof = read_json(context.folder.proof)
    wandb_state = record.finish({key: value for key, value in summary.items() if value is not None}, outcome="finished")
    manifest = context.folder.artifact / MANIFEST
    context.phases.end()
    record.event("finish", step=summary["steps"])
    result = {
        "stage": context.name,
        "kind": context.stage.kind,
        "attempt": context.attempt,
        **summary,
        **_times(context),
        "goodput": _goodput(context),
        "tokens_per_second": run_speed(read_rows(context.folder.metrics)),
        "digest": context.digest,
        "digests": dict(context.content_digests),
        "inputs": dict(context.input_digests),
        "artifact": {
            "kind": artifact_kind(context),
            "path": context.folder.artifact.name,
            "manifest_sha256": file_digest(manifest),
        },
        "base": {"name": context.config.model.base, "folder": str(context.base_folder)},
        "proof": {"loss": proof["loss"], "reopened_loss": proof["reopened_loss"], "rows": proof["rows"]},
        "wandb": wandb_state,
    }
    _write_card(context, result)
    record.close_attempt("finished", "the artifact was proven", exit_code=EXIT_DONE)
    write_json(context.folder.result, result)
    record.log(json.dumps(result, indent=2, ensure_ascii=False))

"""The end of a training: the ranks write the artifact, note what its proof must reproduce, and leave to fresh ranks."""

from __future__ import annotations

from typing import Any, cast

import torch

from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import EXIT_WRITTEN
from orchestrator.metrics import phases as phase
from orchestrator.models.artifact import ArtifactFacts, round_as_saved, write_artifact
from orchestrator.models.artifact_stream import LiveParameters
from orchestrator.run_state.proof_note import Expected, write_note
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext, training_stage
from orchestrator.run_state.stage_result import artifact_kind, recorded_first_loss
from orchestrator.training.evaluation import Evaluation
from orchestrator.training.loop_state import Progress
from orchestrator.training.recipe import Recipe, Session


def write_stage(
    session: Session,
    recipe: Recipe,
    progress: Progress,
    *,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> int:
    """Write the artifact and what its proof must reproduce; every rank must call it. Return the exit code."""
    context, runtime = session.context, session.runtime
    is_rounded = round_as_saved(session.model, context.config)
    known = after.first if recipe.is_proof_scored and after is not None and not is_rounded else None
    scored = recipe.proof() if known is None else known
    context.phases.begin(phase.WRITING)
    _write(session, step=progress.stopping.best_step or progress.step)
    if runtime.is_main:  # the others leave meanwhile: nothing that follows is a collective
        expected = Expected(
            data=context.evaluation_data or context.train_data,
            rows=scored.rows,
            loss=scored.loss,
            micro_size=training_stage(context).batch.micro_size,
            autocast=runtime.autocast_dtype is not None,
        )
        summary = _summary(context, progress, before, after, seconds) | dict(recipe.summary())
        write_note(context, expected, kind=artifact_kind(context), summary=summary, world_size=runtime.world_size)
    return leave_for_proof(context, runtime, session.record)


def leave_for_proof(context: StageContext, runtime: Runtime, record: Recorder) -> int:
    """End this rank's part before the proof; return the exit code by which its launcher starts a fresh one."""
    record.event("written", world_size=runtime.world_size)
    record.finish({}, outcome="stopped")
    context.phases.begin(phase.PROOF, unit=phase.ROWS)
    return EXIT_WRITTEN


def _write(session: Session, *, step: int) -> None:
    context, runtime = session.context, session.runtime
    module = cast("torch.nn.Module", runtime.accelerator.unwrap_model(session.model))
    is_partly = context.config.tuning.freezes_parts  # the artifact is a whole model
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad or is_partly]
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
    about = ArtifactFacts(config=context.config, base_folder=context.base_folder, manifest=facts)
    parameters = LiveParameters(runtime=runtime, module=module, names=names)
    write_artifact(runtime, parameters, context.folder.artifact, about)


def _summary(
    context: StageContext, progress: Progress, before: Evaluation | None, after: Evaluation | None, seconds: float
) -> dict[str, Any]:
    first = before.loss if before is not None else recorded_first_loss(context.folder)
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

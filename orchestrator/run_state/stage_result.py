"""result.json, the last file that a stage writes: without it the stage is not done. Must not import torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.config.run import makes_classifier
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.meta import read_meta
from orchestrator.errors import EXIT_DONE
from orchestrator.files.atomic import write_json, write_text
from orchestrator.files.manifest import MANIFEST, file_digest
from orchestrator.metrics.jsonl import read_rows
from orchestrator.metrics.speed import run_speed
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.goodput import time_spent
from orchestrator.run_state.model_card import CARD, artifact_card
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext


def finish(
    context: StageContext,
    record: Recorder,
    summary: Mapping[str, Any],
    *,
    kind: ArtifactKind,
    proof: Mapping[str, Any] | None = None,
) -> int:
    """Report a stage whose artifact is proven, or is a report, and write its result; only rank 0 does.

    Return the exit code. `proof`: both losses and the number of rows.
    """
    if not record.is_main:
        return EXIT_DONE
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    wandb_state = record.finish(numbers, outcome="finished")
    context.phases.end()
    record.event("finish", step=summary.get("steps", 0))
    result = {
        "stage": context.name,
        "kind": context.stage.kind,
        "attempt": context.attempt,
        **summary,
        **_times(context),
        **_speeds(context),
        "digest": context.digest,
        "digests": dict(context.content_digests),
        "inputs": dict(context.input_digests),
        "artifact": _artifact(context, kind),
        "base": {"name": context.config.model.base, "folder": str(context.base_folder)},
        **({} if proof is None else {"proof": dict(proof)}),
        "wandb": wandb_state,
    }
    _write_card(context, result)
    # The order matters: result.json comes last of all, because without it the stage is not done.
    record.close_attempt("finished", "the artifact was proven", exit_code=EXIT_DONE)
    write_json(context.folder.result, result)
    record.log(json.dumps(result, indent=2, ensure_ascii=False))
    return EXIT_DONE


def artifact_kind(context: StageContext) -> ArtifactKind:
    """The kind of the artifact that a training or blending stage makes."""
    what = "adapter" if context.config.tuning.is_adapter else "model"
    if makes_classifier(context.config, context.name):
        return ArtifactKind(f"classifier_{what}")
    return ArtifactKind(f"reward_{what}" if context.stage.makes == "reward model" else what)


def recorded_first_loss(folder: StageFolder) -> float | None:
    """The held-out loss before the first step, as an earlier attempt recorded it."""
    losses = [row["eval_loss"] for row in read_rows(folder.metrics) if row.get("step") == 0 and "eval_loss" in row]
    return losses[0] if losses and isinstance(losses[0], float) else None


def _artifact(context: StageContext, kind: ArtifactKind) -> dict[str, Any]:
    folder = context.folder.artifact
    return {"kind": kind, "path": folder.name, "manifest_sha256": file_digest(folder / MANIFEST)}


def _times(context: StageContext) -> dict[str, Any]:
    """Seconds of this attempt by phase, and in total; `seconds` is the training alone."""
    by_phase = context.phases.seconds()
    return {"phase_seconds": by_phase, "attempt_seconds": round(time.time() - context.began, 2)}


def _speeds(context: StageContext) -> dict[str, Any]:
    """How the wall-clock time of all attempts at a training was spent, and its speed."""
    if not isinstance(context.stage, TrainingStage):
        return {}
    spent = time_spent(context.folder)
    return {
        "goodput": None if spent is None else spent.to_json(),
        "tokens_per_second": run_speed(read_rows(context.folder.metrics)),
    }


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

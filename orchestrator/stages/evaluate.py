"""Scores the artifact of an earlier stage beside its base: loss of the answers, rewards of what they generate."""

from __future__ import annotations

import shutil
import time
from typing import Any, cast

import torch

from orchestrator.config.ends import EvaluateStage
from orchestrator.config.model import WHOLE_MODEL_TUNINGS
from orchestrator.rundir import publish, write_json, write_manifest
from orchestrator.training.artifact import open_artifact
from orchestrator.training.context import Context, Record
from orchestrator.training.data.rows import PreparedRows
from orchestrator.training.evaluation import evaluate
from orchestrator.training.finish import finish_scoring
from orchestrator.training.judging import generated_rewards
from orchestrator.training.model import DTYPES, load_model
from orchestrator.training.objectives import proof_objective
from orchestrator.training.runtime import Runtime, start_single_runtime
from orchestrator.training.scoring import make_rewards


def run(context: Context) -> int:
    """Scores base and tuned model on the same rows, writes a report, and tells both."""
    record = Record(context, rank=0)
    record.event("start", world_size=1)
    started = time.time()
    runtime = start_single_runtime(context.config, autocast=False)
    tuned: Any = _tuned(context).to(runtime.device).eval()
    is_full = isinstance(context.config.tuning, WHOLE_MODEL_TUNINGS)
    if is_full:
        base: Any = load_model(context.base_folder, context.config, weights_dtype=DTYPES[context.config.model.dtype])
        told = {
            "tuned": scores_of(context, runtime, tuned),
            "base": scores_of(context, runtime, base.to(runtime.device)),
        }
    else:
        told = {"tuned": scores_of(context, runtime, tuned)}
        with tuned.disable_adapter():
            told["base"] = scores_of(context, runtime, tuned)
    for name in told["tuned"]:
        record.say(f"{name:<24} {told['base'][name]:.4f} base, {told['tuned'][name]:.4f} tuned")
    _write(context, told)
    summary = {"scores": told, "seconds": time.time() - started}
    return finish_scoring(context, record, summary, kind="report")


def scores_of(context: Context, runtime: Runtime, model: torch.nn.Module) -> dict[str, float]:
    """Every score of one model."""
    stage = cast("EvaluateStage", context.stage)
    rows = PreparedRows.open(context.train_data)
    objective = proof_objective(runtime, stage, rows.meta.kind)
    scored = evaluate(runtime, model, objective, rows, micro_size=stage.micro_size, limit=stage.rows)
    found = {"loss": scored.loss}
    if stage.rewards:
        rewards = make_rewards(context, runtime, stage.rewards)
        found |= generated_rewards(context, runtime, model, rows, rewards, stage)
    return found


def _tuned(context: Context) -> torch.nn.Module:
    assert context.start is not None, "the pipeline's rules ask for a policy before it"
    dtype = DTYPES[context.config.model.dtype]
    return open_artifact(
        context.start.folder, base_folder=context.base_folder, config=context.config, weights_dtype=dtype
    )


def _write(context: Context, told: dict[str, dict[str, float]]) -> None:
    folder = context.folder.artifact
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / "report.json", told)
    write_manifest(temporary, {"run": context.config.name, "stage": context.name, "kind": "evaluate"})
    publish(temporary, folder)

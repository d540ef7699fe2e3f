"""The end of a stage: write the artifact, prove it in a fresh process, and only then write result.json."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from typing import Any

import torch

from orchestrator.errors import EXIT_DONE, CheckpointError
from orchestrator.metrics.jsonl import read_rows
from orchestrator.rundir import MANIFEST, file_digest, read_json, write_json
from orchestrator.training.artifact import adapter_names, check_tensors, write_artifact
from orchestrator.training.context import Context, Record
from orchestrator.training.data.rows import PreparedRows
from orchestrator.training.evaluation import Evaluation, evaluate
from orchestrator.training.gather import gather_trainable
from orchestrator.training.loop import Job, Progress

PROOF_ROWS = 64
NOT_FOR_CHILDREN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
)


def finish_stage(
    context: Context,
    job: Job,
    record: Record,
    progress: Progress,
    *,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> int:
    """All ranks call it; rank 0 writes, proves and reports. Raises CheckpointError where the proof fails."""
    expectation = _expected_loss(context, job, after)
    weights = gather_trainable(job.runtime, job.model)
    if job.runtime.is_main:
        module = job.runtime.accelerator.unwrap_model(job.model)
        facts = {
            "run": context.config.name,
            "stage": context.name,
            "step": progress.step,
            "tuning": context.config.tuning.method,
        }
        write_artifact(
            module,
            weights,
            context.folder.artifact,
            base_folder=context.base_folder,
            config=context.config,
            facts=facts,
        )
        names = adapter_names(module, weights, context.config)
        check_tensors(context.folder.artifact, names)
        _write_expectation(context, expectation, autocast=job.runtime.autocast_dtype is not None)
    is_main = job.runtime.is_main
    summary = _summary(context, progress, before, after, seconds)
    runtime = job.runtime
    del job, weights
    gc.collect()
    runtime.end()
    if is_main:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _prove_in_fresh_process(context)
        _report(context, record, summary)
    return EXIT_DONE


def _expected_loss(context: Context, job: Job, after: Evaluation | None) -> dict[str, Any]:
    """The trainer's own loss on the rows that the proof scores again: held-out rows, or the first train rows."""
    folder = context.evaluation_data or context.train_data
    rows = PreparedRows.open(folder)
    micro_size = context.stage.batch.micro_size
    scored = after
    if scored is None or scored.rows > PROOF_ROWS:
        scored = evaluate(job.runtime, job.model, job.loss, rows, micro_size=micro_size, limit=PROOF_ROWS)
    return {"data": str(folder), "rows": scored.rows, "loss": scored.loss, "micro_size": micro_size}


def _write_expectation(context: Context, expectation: dict[str, Any], *, autocast: bool) -> None:
    write_json(context.folder.proof, {**expectation, "autocast": autocast, "base_folder": str(context.base_folder)})


def _prove_in_fresh_process(context: Context) -> None:
    """Runs `orchestrator.training.prove`, which knows nothing but the files."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_FOR_CHILDREN and not name.startswith("TORCHELASTIC")
    }
    argv = [sys.executable, "-m", "orchestrator.training.prove", str(context.run_file), "--stage", context.name]
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, check=False)
    proof = read_json(context.folder.proof)
    if done.returncode != 0 or "reopened_loss" not in proof:
        raise CheckpointError(
            proof.get("problems") or f"{context.folder.artifact}: the proof ended with exit code {done.returncode}"
        )


def _summary(
    context: Context, progress: Progress, before: Evaluation | None, after: Evaluation | None, seconds: float
) -> dict[str, Any]:
    first = before.loss if before is not None else _recorded_first_loss(context)
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "eval_loss_before": first,
        "eval_loss_after": after.loss if after is not None else None,
        "seconds": seconds,
    }


def _recorded_first_loss(context: Context) -> float | None:
    losses = [
        row["eval_loss"] for row in read_rows(context.folder.metrics) if row.get("step") == 0 and "eval_loss" in row
    ]
    return losses[0] if losses and isinstance(losses[0], float) else None


def _report(context: Context, record: Record, summary: dict[str, Any]) -> None:
    proof = read_json(context.folder.proof)
    rates = [
        row["tokens_per_second"]
        for row in read_rows(context.folder.metrics)
        if isinstance(row.get("tokens_per_second"), float)
    ]
    told = record.finish({key: value for key, value in summary.items() if value is not None}, outcome="finished")
    manifest = context.folder.artifact / MANIFEST
    result = {
        "stage": context.name,
        "kind": context.stage.kind,
        "attempt": context.attempt,
        **summary,
        "tokens_per_second": sorted(rates)[len(rates) // 2] if rates else None,
        "artifact": {
            "kind": "model" if context.config.tuning.method == "full" else "adapter",
            "path": str(context.folder.artifact),
            "manifest_sha256": file_digest(manifest),
        },
        "base": {"name": context.config.model.base, "folder": str(context.base_folder)},
        "proof": {"loss": proof["loss"], "reopened_loss": proof["reopened_loss"], "rows": proof["rows"]},
        "wandb": told,
    }
    record.event("finish", step=summary["steps"])
    record.close_attempt("finished", "the artifact was proven", exit_code=EXIT_DONE)
    write_json(context.folder.result, result)
    record.say(json.dumps(result, indent=2, ensure_ascii=False))

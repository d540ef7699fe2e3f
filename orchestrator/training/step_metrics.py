"""The metrics of a step: its row of metrics.jsonl, and the source rows it used. Knows no files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.schedule import learning_rate_at
from orchestrator.training.loop_state import LoopInputs, Progress, StepResult


def metrics_row(job: LoopInputs, progress: Progress, window: Sequence[StepResult]) -> dict[str, Any]:
    """A row of metrics.jsonl over the steps since the last row; the loss covers only the steps that updated."""
    step = progress.step
    good = [result for result in window if result.fault is None]
    tokens = sum(result.tokens for result in window)
    seconds = sum(result.seconds for result in window)
    known = job.flops_per_token is not None and job.peak_flops is not None
    return {
        "step": step,
        "epoch": step / job.order.steps_per_epoch,
        **_means(job, good),
        **window[-1].extra_metrics,
        "grad_norm": window[-1].grad_norm,
        "lr": learning_rate_at(job.stage, step, job.steps),
        "tokens": tokens,
        "trained_tokens": sum(result.trained_tokens for result in window),
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / len(window),
        "data_seconds": sum(result.data_seconds for result in window) / len(window),
        "num_steps": len(window),
        "rollout_seconds": sum(result.rollout_seconds for result in window),
        "memory_gib": job.runtime.peak_memory_gib(),
        "mfu": (job.flops_per_token or 0.0) * tokens / seconds / (job.peak_flops or 1.0) if known else None,
        "skipped_updates": progress.health.skipped + len(progress.health.omitted),
        "rows_digest": _rows_digest(job, step),
        **({} if job.profiler is None else job.profiler.take(len(window))),
    }


def _means(job: LoopInputs, results: Sequence[StepResult]) -> dict[str, float]:
    """Loss and measures as means over the units of the steps."""
    weight = sum(result.weight for result in results)
    names = ("loss", *job.objective.measures)
    return {
        name: sum(result.sums[index] for result in results) / weight if results else math.nan
        for index, name in enumerate(names)
    }


def micro_batches_of(job: LoopInputs, step: int) -> list[npt.NDArray[np.int64]]:
    """The micro-batches that this rank computes at a step (from 1)."""
    return job.order.micro_batches(
        step - 1, rank=job.runtime.rank, world_size=job.runtime.world_size, micro_size=job.stage.batch.micro_size
    )


def real_indices(job: LoopInputs, step: int) -> npt.NDArray[np.int64]:
    indices = job.order.global_batch(step - 1)
    return indices[indices >= 0]


def row_ids_of(job: LoopInputs, step: int) -> list[int]:
    """Ids of the source rows of a step's batch."""
    return [int(row) for index in real_indices(job, step).tolist() for row in job.rows.row_ids(index)]


def _rows_digest(job: LoopInputs, step: int) -> str:
    """Eight characters by which to check whether two runs saw the same rows in the same order at a step."""
    return hashlib.sha256(json.dumps(row_ids_of(job, step)).encode()).hexdigest()[:8]

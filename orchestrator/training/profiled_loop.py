"""The training loop with a profiler if `profile=true` asks for one. Must not know stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.loop import train
from orchestrator.training.loop_state import LoopCallbacks, LoopInputs, Progress, profiled_callbacks
from orchestrator.training.profiler import Profiler, describe_shares


def train_profiled(
    context: StageContext, record: Recorder, job: LoopInputs, progress: Progress, hooks: LoopCallbacks
) -> Progress:
    """Run `loop.train`, then write the breakdown of its steps to the stage's folder and the log."""
    left = job.steps - progress.step
    if not context.config.profile or left < 1:
        return train(job, progress, hooks)
    rank = job.runtime.rank
    profiler = Profiler(
        context.folder.profile, device=job.runtime.device, rank=rank, attempt=context.attempt, steps=left
    )
    if job.runtime.uses_deepspeed:
        _watch_update(job.model, profiler)
    progress = train(replace(job, profiler=profiler), progress, profiled_callbacks(hooks, profiler))
    record.event("profile", step=progress.step, **describe_shares(profiler.close()))
    return progress


def _watch_update(engine: Any, profiler: Profiler) -> None:
    """Profile DeepSpeed's step as its own span: it updates inside its backward pass."""
    engine.step = profiler.watch(engine.step, "optimizer")

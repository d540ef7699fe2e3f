"""Which checkpoint all ranks resume from: each verifies a share of the files; a fault found by one counts for all."""

from __future__ import annotations

from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.checkpoints import Tell, VerifiedCheckpoint
from orchestrator.run_folder.folder import StageFolder


def newest_proven(
    runtime: Runtime, folder: StageFolder, tell: Tell, *, before: int | None = None
) -> VerifiedCheckpoint | None:
    """The newest checkpoint (older than step `before`) proven by its manifest; every rank must call it.

    Each newer checkpoint that fails its proof is reported and moved to quarantine/.
    """
    if runtime.is_main:
        checkpoints.recover_interrupted_save(folder)
    while True:
        runtime.barrier()
        step = _newest_step(runtime, folder, before)
        if step is None:
            return None
        found = _verified_together(runtime, folder, step)
        if found is not None:
            return found
        if runtime.is_main:
            checkpoints.quarantine(folder, step, _problems(folder, step), tell)


def _newest_step(runtime: Runtime, folder: StageFolder, before: int | None) -> int | None:
    """As rank 0 sees the folder: other ranks might see a stale listing."""
    steps = [step for step in checkpoints.saved_steps(folder) if before is None or step < before]
    own = max(steps, default=-1) if runtime.is_main else 0
    # The other ranks add 0: the sum broadcasts rank 0's answer.
    (step,) = runtime.sum_over_ranks([float(own)])
    return None if step < 0 else int(step)


def _verified_together(runtime: Runtime, folder: StageFolder, step: int) -> VerifiedCheckpoint | None:
    found = None
    try:
        found = checkpoints.verify(folder.checkpoint(step), share=slice(runtime.rank, None, runtime.world_size))
    except CheckpointError as error:
        print("\n".join(f"rank {runtime.rank}: {problem}" for problem in error.problems), flush=True)
    (faults,) = runtime.sum_over_ranks([float(found is None)])
    return found if faults == 0 else None


def _problems(folder: StageFolder, step: int) -> list[str]:
    try:
        checkpoints.verify(folder.checkpoint(step))
    except CheckpointError as error:
        return list(error.problems)
    return ["a rank read other content than rank 0; see the log"]

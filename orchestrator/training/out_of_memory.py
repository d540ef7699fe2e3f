"""The report of an out-of-memory error: phase, planned and actual memory, what to change. Must not know the loop."""

from __future__ import annotations

import resource
import socket
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from orchestrator.errors import OrchestratorError, TrainingFailed
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.stage_context import StageContext

PHASES = {
    "open_session": "load",
    "resume": "resume",
    "restore": "resume",
    "before_step": "rollout",
    "evaluate": "evaluation",
    "score": "evaluation",
    "terms": "forward",
    "backward": "backward",
    "update": "optimizer step",
    "save": "save",
    "rehearse": "save",
    "gather_trainable": "save",
}
"""By the function that was running; the innermost known one decides."""
SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
GIB = 2**30


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: CUDA's, the host's, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def autopsy(
    context: StageContext, error: BaseException, *, rank: int, step: int, device: torch.device
) -> TrainingFailed:
    """The error to raise instead of the allocator's. The global batch is never changed silently: the user decides."""
    phase = phase_of(error)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    found = [
        f"out of memory in the {phase} of step {step}, rank {rank} on {socket.gethostname()}: {first}",
        f"actual: {_actual(device)}",
        *_planned(context, phase),
        *_changes(context),
    ]
    return TrainingFailed(found)


def phase_of(error: BaseException) -> str:
    """The phase in which the traceback was raised."""
    # By function name: the error itself does not say in which phase the allocator refused.
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((PHASES[name] for name in reversed(names) if name in PHASES), "start")


def _actual(device: torch.device) -> str:
    if device.type != "cuda":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        room = "" if limit == resource.RLIM_INFINITY else f", address space limited to {limit / GIB:.1f} GiB"
        return f"{peak:.1f} GiB of host memory at its peak{room}"
    free, total = torch.cuda.mem_get_info(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"{peak / GIB:.1f} GiB allocated at its peak, {reserved / GIB:.1f} GiB reserved, {free / GIB:.1f} of "
        f"{total / GIB:.1f} GiB free on the device"
    )


def _planned(context: StageContext, phase: str) -> Iterator[str]:
    """The plan's memory components of the phase; nothing if the plan could not know the model."""
    stages: list[dict[str, Any]] = read_json(RunFolder(context.run_file.parent).plan)["stages"]
    memory = next((stage["memory"] for stage in stages if stage["name"] == context.name), None)
    if memory is None:
        return
    for one in memory["phases"]:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in one["device"].items() if value >= 0.005)
        mark = " <- here" if one["name"] == phase else ""
        yield f"planned: {one['name']} {one['expected']:.2f} GiB ({one['low']:.2f} to {one['high']:.2f}): {parts}{mark}"


def _changes(context: StageContext) -> list[str]:
    """Settings that need less memory, the fastest first."""
    from orchestrator.planning.auto_settings import smaller_settings

    try:
        return [
            f"this needs less at the same global batch: {overrides}"
            for overrides in smaller_settings(context.config, context.name)
        ]
    except OrchestratorError as error:
        return [f"type `orchestrator plan advise=true` with the same overrides to see what fits ({error.problems[0]})"]

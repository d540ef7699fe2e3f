"""Saves and restores the training state of a stage; writing goes on in the background. Folders and proofs are `orchestrator.checkpoints`'."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from orchestrator import checkpoints
from orchestrator.checkpoints import Event, Found
from orchestrator.rundir import StageFolder, read_json
from orchestrator.training.checkpoint_writer import CheckpointWriter, Pending
from orchestrator.training.context import Context, Record
from orchestrator.training.loop import Progress
from orchestrator.training.runtime import Runtime
from orchestrator.training.state import INDEX, collect, restore, restore_random_state


class Checkpointer:
    """Owns the background write. Every rank calls every method at the same step."""

    def __init__(
        self, *, context: Context, runtime: Runtime, model: torch.nn.Module, optimizer: Any, record: Record
    ) -> None:
        self._context, self._runtime, self._model, self._optimizer = context, runtime, model, optimizer
        self._writer = CheckpointWriter(
            folder=context.folder, settings=context.stage.checkpoint, rank=runtime.rank, world_size=runtime.world_size, record=record
        )
        self._buffers: dict[str, torch.Tensor] = {}

    def save(self, progress: Progress) -> None:
        """Takes a snapshot and goes on; waits first where the last save is still being written."""
        start = time.perf_counter()
        self._writer.wait(for_newer=True)
        state = collect(self._runtime, self._model, self._optimizer)
        tensors = self._snapshot(state.tensors)
        pending = Pending(
            step=progress.step,
            tensors=tensors,
            metadata={INDEX: json.dumps(state.index)},
            state=asdict(progress),
            facts=self._facts(progress),
            stall_seconds=time.perf_counter() - start,
        )
        self._writer.start(pending)

    def close(self) -> int | None:
        """Waits for the last save; the newest step that this attempt proved."""
        self._writer.close()
        return self._writer.proven_step

    def _snapshot(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Host copies, in memory that is kept from save to save: fresh pages would cost more than the copy."""
        for name, tensor in tensors.items():
            room = self._buffers.get(name)
            if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor, non_blocking=True)
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        return {name: self._buffers[name] for name in tensors}

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "world_size": self._runtime.world_size,
            "sharding": self._context.config.sharding.strategy,
            "attempt": self._context.attempt,
            "created": time.time(),
        }


def newest_proven(folder: StageFolder, event: Event) -> Found | None:
    """The checkpoint to go on from; rank 0 proves it and tells the others. Every rank must call it."""
    found = checkpoints.newest_proven(folder, event) if _rank() == 0 else None
    step = _from_rank_zero(-1 if found is None else found.step)
    if found is not None or step < 0:
        return found
    place = folder.checkpoint(step)
    return Found(step=step, folder=place, manifest=read_json(place / checkpoints.MANIFEST))


def load_weights_before_prepare(found: Found, model: torch.nn.Module) -> None:
    """Nothing to do: `load_after_prepare` brings weights and optimizer alike."""


def load_after_prepare(found: Found, runtime: Runtime, model: torch.nn.Module, optimizer: Any) -> Progress:
    """Puts weights, optimizer and random states back; where the run stood. Every rank must call it."""
    same_world = found.world_size == runtime.world_size
    sharding = _sharding(runtime, model)
    restore(found.rank_files, runtime, model, optimizer, same_ranks=same_world and found.manifest["sharding"] == sharding)
    if same_world:
        restore_random_state(found.rank_files[runtime.rank], runtime.device)
    return Progress(**found.state)


def _sharding(runtime: Runtime, model: Any) -> str:
    return f"zero{model.zero_optimization_stage()}" if runtime.uses_deepspeed else "none"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_rank_zero(value: int) -> int:
    if not dist.is_initialized():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return int(tensor)

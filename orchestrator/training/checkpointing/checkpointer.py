"""Saves, restores and rolls back a stage's training state. `orchestrator.run_folder.checkpoints` owns the folders."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import set_seed

from orchestrator.config.run import accumulation_steps
from orchestrator.config.tracking import WandbTracking
from orchestrator.distributed.random_state import seed_of
from orchestrator.distributed.runtime import Runtime
from orchestrator.distributed.zero_fragments import count_trained
from orchestrator.errors import CheckpointError
from orchestrator.estimate.checkpoint_size import bytes_of_one, most_bytes
from orchestrator.files.atomic import free_bytes, read_json, write_json
from orchestrator.installation.versions import TRAINING_PACKAGES, versions_of
from orchestrator.metrics.wandb.process import run_id
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.checkpoints import VerifiedCheckpoint
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.resume_rules import refuse_changes, settings_that_matter
from orchestrator.run_state.stage_context import StageContext, training_stage
from orchestrator.training.checkpointing.newest_proven import newest_proven
from orchestrator.training.checkpointing.training_state import collect, restore, restore_random_state
from orchestrator.training.checkpointing.writer import CheckpointWriter, Pending
from orchestrator.training.checkpointing.written_state import INDEX
from orchestrator.training.early_stopping import Stopping
from orchestrator.training.faults import health_from_json
from orchestrator.training.loop_state import Progress

MEBIBYTE = 1 << 20
PROBE_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative; other rank counts and ZeRO stages sum in a different order."""


@dataclass(frozen=True, kw_only=True)
class CheckpointedState:
    """What is saved: model and optimizer as prepared by Accelerate."""

    runtime: Runtime
    model: torch.nn.Module
    optimizer: Any
    data_digest: str
    probe: Callable[[], float] | None
    """The model's loss on a fixed set of rows; every rank calls it."""


class Checkpointer:
    """Owns the background write. Every rank calls every method, at the same step."""

    def __init__(self, context: StageContext, subject: CheckpointedState, record: Recorder) -> None:
        self._context, self._subject, self._record = context, subject, record
        self._writer = CheckpointWriter(
            folder=context.folder,
            settings=training_stage(context).checkpoint,
            rank=subject.runtime.rank,
            world_size=subject.runtime.world_size,
            record=record,
        )
        self._buffers: dict[str, torch.Tensor] = {}
        self._evaluated: tuple[int, float] | None = None
        self._best: dict[str, Any] | None = None
        if subject.runtime.is_main:
            self._log_space()

    def note_evaluation(self, step: int, loss: float) -> None:
        """Note the held-out loss of a step; the checkpoint of the same step carries it."""
        self._evaluated = (step, loss)
        if self._best is None or loss < self._best["loss"]:
            self._best = {"step": step, "loss": loss}

    def save(self, progress: Progress) -> None:
        """Take a snapshot and return to training; waits first if the previous save is still being written.

        A model whose probe loss is not finite is not saved: rolling back to it would be useless.
        """
        start = time.perf_counter()
        self._writer.wait(for_newer=True)
        probe = None if self._subject.probe is None else self._subject.probe()
        if probe is not None and not math.isfinite(probe):
            self._record.event("save_refused", step=progress.step, why=f"the probe's loss is {probe}")
            self._record.log(f"warning: step {progress.step} is not saved: the loss on the probe's rows is {probe}")
            return
        probe_seconds = time.perf_counter() - start
        self._writer.start(self._pending(progress, probe=probe, start=start, probe_seconds=probe_seconds))

    def _pending(self, progress: Progress, *, probe: float | None, start: float, probe_seconds: float) -> Pending:
        state = collect(self._subject.runtime, self._subject.model, self._subject.optimizer)
        return Pending(
            step=progress.step,
            tensors=self._snapshot(state.tensors),
            metadata={INDEX: json.dumps(state.index)},
            state=self._state(progress, probe),
            facts=self._facts(progress),
            stall_seconds=time.perf_counter() - start,
            probe_seconds=probe_seconds,
        )

    def rehearse(self, progress: Progress) -> None:
        """Write a checkpoint, read it back and remove it; CheckpointError if the disk would refuse the real ones."""
        if training_stage(self._context).checkpoint.rehearse:
            self._writer.rehearse(self._pending(progress, probe=None, start=time.perf_counter(), probe_seconds=0.0))

    def resume(self) -> Progress | None:
        """Restore everything from the newest proven checkpoint; None if there is none.

        ConfigError if a relevant setting changed; CheckpointError if the probe loss is not reproduced.
        """
        found = newest_proven(self._subject.runtime, self._context.folder, self._report_moved)
        if found is None:
            return None
        progress = self._restored(found)
        if self._context.folder.rollbacks.exists():
            known = read_json(self._context.folder.rollbacks)
            health = replace(progress.health, omitted=tuple(known["omitted"]), rollbacks=known["rollbacks"])
            progress = replace(progress, health=health)
        self._record.event("resume", step=progress.step, **self._changes(found))
        return progress

    def roll_back(self, progress: Progress) -> Progress | None:
        """Go back to before the streak of faults and exclude its data; None if no checkpoint is that old."""
        start = time.perf_counter()
        self._writer.wait(for_newer=True)
        streak = progress.health.streak
        found = newest_proven(self._subject.runtime, self._context.folder, self._report_moved, before=streak[0])
        if found is None:
            return None
        earlier = self._restored(found)
        omitted = tuple(sorted({*progress.health.omitted, *streak}))
        health = replace(earlier.health, omitted=omitted, rollbacks=progress.health.rollbacks + 1)
        if self._subject.runtime.is_main:
            self._forget_after(found.step)
            write_json(self._context.folder.rollbacks, {"omitted": list(omitted), "rollbacks": health.rollbacks})
        self._record.event(
            "roll_back",
            from_step=progress.step,
            to_step=found.step,
            omitted_steps=list(streak),
            seconds=time.perf_counter() - start,
        )
        self._record.log(
            f"rolled back from step {progress.step} to {found.step}; the data of steps {list(streak)} is skipped"
        )
        self._record.rollbacks = health.rollbacks
        return replace(earlier, health=health)

    def restore_step(self, step: int) -> bool:
        """Restore the model of a retained checkpoint's step; warns and returns False if that is not proven.

        Call it after `close`: nothing may be trained or saved afterwards.
        """
        found = newest_proven(self._subject.runtime, self._context.folder, self._report_moved, before=step + 1)
        if found is None or found.step != step:
            self._record.event("best_lost", step=step)
            self._record.log(f"warning: the best checkpoint, of step {step}, is missing; the last weights are used")
            return False
        self._restored(found)
        self._record.event("best", step=step)
        self._record.log(f"the best weights, of step {step}, are restored")
        return True

    def close(self) -> int | None:
        """Wait for the last save; return the newest step proven by this attempt."""
        self._writer.close()
        return self._writer.proven_step

    def _report_moved(self, event: str, **facts: Any) -> None:
        """Report a checkpoint that was moved aside, to the record and the log."""
        self._record.event(event, **facts)
        self._record.log(
            f"warning: the checkpoint of step {facts['step']} is not used: {facts['why'][0]}; it is in {facts['moved_to']}"
        )

    def _log_space(self) -> None:
        """Log the disk space the checkpoints will take, next to the free space."""
        stage = training_stage(self._context)
        trained = count_trained(self._subject.runtime, self._subject.model)
        one = bytes_of_one(trained, stage.optimizer)
        most = most_bytes(one, stage.checkpoint, self._record.total_steps)
        free = free_bytes(self._context.folder.checkpoints)
        self._record.event("space", checkpoint_bytes=one, most_bytes=most, free_bytes=free)
        message = f"a checkpoint takes {one / MEBIBYTE:,.1f} MiB, all of them at most {most / MEBIBYTE:,.1f}; {free / MEBIBYTE:,.0f} are free"
        self._record.log(message if most < free else f"warning: {message}: saves will fail until space is freed")

    def _restored(self, found: VerifiedCheckpoint) -> Progress:
        subject, state = self._subject, found.state
        self._log_accepted(state)
        same_ranks = found.world_size == subject.runtime.world_size
        same_layout = same_ranks and found.manifest["sharding"] == self._context.config.sharding.strategy
        restore(found.rank_files, subject.runtime, subject.model, subject.optimizer, same_ranks=same_layout)
        self._check_probe(found.step, state["probe"])
        if same_ranks:
            restore_random_state(found.rank_files[subject.runtime.rank], subject.runtime.device)
        else:
            # The stored generator states belong to other ranks; no rank may repeat the noise of another.
            set_seed(seed_of(self._context.config.seeds.weights, step=found.step, rank=subject.runtime.rank))
        self._best = state["best"]
        return _progress_from_json(state["progress"])

    def _log_accepted(self, state: dict[str, Any]) -> None:
        context = self._context
        accepted = frozenset(training_stage(context).checkpoint.accept_changes)
        for sentence in refuse_changes(state["settings"], self._settings(), stage=context.name, accepted=accepted):
            self._record.log(f"accepted: {sentence}")

    def _check_probe(self, step: int, stored: float | None) -> None:
        """Raise CheckpointError if the restored model does not score as the saved one did."""
        if stored is None or self._subject.probe is None:
            return
        loss = self._subject.probe()
        allowed = PROBE_TOLERANCE[self._context.config.model.dtype]
        if not abs(loss - stored) <= allowed * abs(stored):
            raise CheckpointError(
                f"step {step} was restored, but its loss on the probe's rows is {loss:.7g}, {stored:.7g} was stored; they differ by "
                f"{abs(loss - stored) / abs(stored):.2g}, {allowed:g} is allowed. Nothing was trained"
            )

    def _snapshot(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Host copies, in buffers reused from save to save: allocating fresh pages would cost more than the copy."""
        for name, tensor in tensors.items():
            room = self._buffers.get(name)
            if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
                # Pinned memory lets the copy from a GPU run asynchronously.
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor, non_blocking=True)
        if self._subject.runtime.device.type == "cuda":
            # The copies are asynchronous; the next step would overwrite what they read.
            torch.cuda.synchronize(self._subject.runtime.device)
        return {name: self._buffers[name] for name in tensors}

    def _state(self, progress: Progress, probe: float | None) -> dict[str, Any]:
        tracked = isinstance(self._context.config.tracking, WandbTracking) and self._subject.runtime.is_main
        return {
            "progress": asdict(progress),
            "probe": probe,
            "best": self._best,
            "wandb_id": run_id(self._context.folder.wandb) if tracked else None,
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        digest = {f"stages.{self._context.name}.data": self._subject.data_digest}
        return {**settings_that_matter(self._context.config, self._context.name), **digest}

    def _facts(self, progress: Progress) -> dict[str, Any]:
        at_this_step = self._evaluated is not None and self._evaluated[0] == progress.step
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "world_size": self._subject.runtime.world_size,
            "sharding": self._context.config.sharding.strategy,
            "attempt": self._context.attempt,
            "created": time.time(),
            "best_step": progress.stopping.best_step,
            "eval_loss": self._evaluated[1] if at_this_step and self._evaluated is not None else None,
            "config_digest": checkpoints.digest_of(self._settings()),
            "data_digest": self._subject.data_digest,
            "versions": {
                name: version for name, version in versions_of(TRAINING_PACKAGES).items() if version is not None
            },
        }

    def _changes(self, found: VerifiedCheckpoint) -> dict[str, Any]:
        config, stage = self._context.config, training_stage(self._context)
        return {
            "world_size": [found.world_size, self._subject.runtime.world_size],
            "sharding": [found.manifest["sharding"], config.sharding.strategy],
            "random_states": "kept" if found.world_size == self._subject.runtime.world_size else "re-seeded",
            "micro_size": stage.batch.micro_size,
            "micro_batches_per_rank": accumulation_steps(config, stage),
        }

    def _forget_after(self, step: int) -> None:
        """Move checkpoints newer than the restored one aside: their weights are in doubt."""
        folder = self._context.folder
        for newer in checkpoints.saved_steps(folder):
            if newer > step:
                checkpoints.quarantine(folder, newer, [f"a rollback returned to step {step}"], self._report_moved)


def _progress_from_json(values: dict[str, Any]) -> Progress:
    health, stopping = health_from_json(values["health"]), Stopping(**values["stopping"])
    return Progress(**{**values, "health": health, "stopping": stopping})

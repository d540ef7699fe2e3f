"""Writes snapshots to disk in the background: each rank its file, then rank 0 manifest and name. Knows no model."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from orchestrator.config.training import CheckpointConfig
from orchestrator.errors import CheckpointError, RunFolderError
from orchestrator.files.atomic import free_bytes, write_json
from orchestrator.files.manifest import file_digest
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.recorder import Recorder
from orchestrator.training.checkpointing.tensor_files import Written, check_written, write_tensors

GROUP_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for one with a slow disk; noticing a dead rank is the launcher's job."""
FINE, UNPROVEN = 0, -1
MEBIBYTE = 1 << 20
_REPORT = struct.Struct("<iq32s")


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A snapshot on its way to disk."""

    step: int
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    state: dict[str, Any]
    """State of the run as a whole; written by rank 0."""
    facts: dict[str, Any]
    """For the manifest."""
    stall_seconds: float
    """Seconds that training was stalled before the write began: finishing the last write, the probe, the snapshot."""
    probe_seconds: float
    """The part of the stall spent on the probe."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome on one rank: FINE, UNPROVEN or an errno; and the file it wrote."""

    status: int
    written: Written


NOTHING = Report(status=FINE, written=Written(bytes=0, sha256="00" * 32))


class CheckpointWriter:
    """Owns the writing thread and its process group. At most one write is in flight."""

    def __init__(
        self, *, folder: StageFolder, settings: CheckpointConfig, rank: int, world_size: int, record: Recorder
    ) -> None:
        self._folder, self._settings, self._record = folder, settings, record
        self._rank, self._world_size = rank, world_size
        # A group of its own: the writing threads exchange reports while the training threads communicate.
        group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if world_size > 1 else None
        self._group = cast("dist.ProcessGroup | None", group)
        self._thread: threading.Thread | None = None
        self._newer_waits = threading.Event()
        self._defect: BaseException | None = None
        self.proven_step: int | None = None

    def start(self, pending: Pending) -> None:
        """Begin to write; returns immediately if the configuration says background."""
        assert self._thread is None, "one write at a time"
        self._newer_waits.clear()
        self._thread = threading.Thread(target=self._run, args=(pending,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._settings.background:
            self.wait()

    def rehearse(self, pending: Pending) -> None:
        """Write a save, prove its files and remove them; every rank raises the same CheckpointError on failure."""
        start = time.perf_counter()
        partial = self._folder.checkpoint_partial(pending.step)
        problem, _ = self._write_all(partial, pending)
        self._as_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        size = sum(tensor.numel() * tensor.element_size() for tensor in pending.tensors.values())
        if problem is not None:
            free = free_bytes(self._folder.root)
            raise CheckpointError(
                f"the trial checkpoint after the first step could not be written: {problem}; this rank's part takes "
                f"{size / MEBIBYTE:,.1f} MiB, {self._world_size} ranks write, {free / MEBIBYTE:,.1f} MiB are free there. Free some space or "
                "set output_dir to another disk (checkpoint.rehearse=false skips the trial)"
            )
        self._record.event("rehearsal", step=pending.step, seconds=time.perf_counter() - start, rank_0_bytes=size)

    def wait(self, *, for_newer: bool = False) -> None:
        """Return once nothing is in flight; `for_newer` cancels the retries of a failed save."""
        if for_newer:
            self._newer_waits.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._defect is not None:
            raise self._defect

    def close(self) -> None:
        """Wait, and release the process group; every rank must call it."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _run(self, pending: Pending) -> None:
        try:
            self._write_until_proven(pending)
        except BaseException as error:  # raised again by `wait`, on the training thread
            self._defect = error

    def _write_until_proven(self, pending: Pending) -> None:
        for trial in range(1, self._settings.retries + 2):
            start = time.perf_counter()
            problem = self._try(pending)
            if problem is None:
                self.proven_step = pending.step
                self._record_saved(pending, time.perf_counter() - start)
                return
            self._record_failed(pending, problem)
            if trial > self._settings.retries or self._called_off():
                return

    def _called_off(self) -> bool:
        """Whether a newer snapshot is waiting; the ranks agree on this after the pause."""
        newer = self._newer_waits.wait(self._settings.retry_seconds)
        reports = self._exchange(Report(status=errno.EAGAIN, written=NOTHING.written) if newer else NOTHING)
        return any(report.status for report in reports)

    def _try(self, pending: Pending) -> str | None:
        """Write, prove and name a checkpoint; otherwise return what went wrong, the same on every rank."""
        partial = self._folder.checkpoint_partial(pending.step)
        problem, reports = self._write_all(partial, pending)
        if problem is None:
            problem = _problem(self._exchange(self._as_main(lambda: self._commit(partial, pending, reports))))
        if problem is not None:
            self._as_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        return problem

    def _write_all(self, partial: Path, pending: Pending) -> tuple[str | None, list[Report]]:
        """Write and prove every rank's file: (the error common to all ranks, or None; the reports of all ranks)."""
        problem = _problem(self._exchange(self._as_main(lambda: _recreate(partial))))
        if problem is not None:
            return problem, []
        reports = self._exchange(_tried(lambda: self._write_own_file(partial, pending)))
        return _problem(reports), reports

    def _write_own_file(self, partial: Path, pending: Pending) -> Written:
        path = partial / checkpoints.rank_file(self._rank)
        written = write_tensors(path, pending.tensors, pending.metadata)
        check_written(path, written)
        return written

    def _commit(self, partial: Path, pending: Pending, reports: Sequence[Report]) -> None:
        """On rank 0, after all ranks have proven their files: write the state of the run, the manifest, the name."""
        state = partial / checkpoints.STATE
        write_json(state, pending.state)
        files = {checkpoints.rank_file(rank): report.written for rank, report in enumerate(reports)}
        files[checkpoints.STATE] = Written(bytes=state.stat().st_size, sha256=file_digest(state))
        entries = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
        # The manifest and the final name come last: a folder without them was never finished.
        checkpoints.commit(partial, self._folder.checkpoint(pending.step), pending.facts, entries)
        # Only now: at every moment at least one proven checkpoint is on disk.
        self._retain(pending.facts["best_step"])

    def _retain(self, best_step: int | None) -> None:
        """Delete what retention releases, now that the new checkpoint is proven. Early stopping retains its best."""
        settings = self._settings
        best = checkpoints.best_step(self._folder) if settings.keep_best and best_step is None else best_step
        steps = checkpoints.saved_steps(self._folder)
        leaving = checkpoints.expired_steps(
            steps, keep_last=settings.keep_last, keep_every=settings.keep_every, best=best
        )
        try:
            checkpoints.delete(self._folder, leaving)
        except OSError as error:
            self._record.log(f"warning: an old checkpoint could not be deleted: {error}")

    def _record_saved(self, pending: Pending, seconds: float) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in pending.tensors.values())
        stall = pending.stall_seconds if self._settings.background else pending.stall_seconds + seconds
        self._record.event(
            "save",
            step=pending.step,
            save_seconds=seconds,
            save_stall_seconds=stall,
            probe_seconds=pending.probe_seconds,
            rank_0_bytes=size,
        )

    def _record_failed(self, pending: Pending, problem: str) -> None:
        self._record.event("save_failed", step=pending.step, why=problem)
        self._record.log(f"warning: the checkpoint of step {pending.step} could not be written: {problem}")

    def _as_main(self, action: Callable[[], None]) -> Report:
        def act() -> Written:
            if self._rank == 0:
                action()
            return NOTHING.written

        return _tried(act)

    def _exchange(self, report: Report) -> list[Report]:
        """The reports of all ranks, in rank order."""
        if self._group is None:
            return [report]
        packed = _REPORT.pack(report.status, report.written.bytes, bytes.fromhex(report.written.sha256))
        own = torch.tensor(list(packed), dtype=torch.uint8)
        gathered = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(gathered, own, group=self._group)
        unpacked = [_REPORT.unpack(bytes(tensor.tolist())) for tensor in gathered]
        return [Report(status=status, written=Written(bytes=size, sha256=sha.hex())) for status, size, sha in unpacked]


def _recreate(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _tried(action: Callable[[], Written]) -> Report:
    """Run an action that a disk may refuse; any other exception is a bug and propagates."""
    try:
        return Report(status=FINE, written=action())
    except OSError as error:
        status = error.errno or errno.EIO
    except RunFolderError as error:
        cause = error.__context__
        status = cause.errno or errno.EIO if isinstance(cause, OSError) else errno.EIO
    except CheckpointError:
        status = UNPROVEN
    return Report(status=status, written=NOTHING.written)


def _problem(reports: Sequence[Report]) -> str | None:
    sentences = [
        f"rank {rank}: {_sentence(report.status)}" for rank, report in enumerate(reports) if report.status != FINE
    ]
    return "; ".join(sentences) or None


def _sentence(status: int) -> str:
    return "what was read back is not what was written" if status == UNPROVEN else os.strerror(status)

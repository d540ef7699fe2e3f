"""Log-probabilities of prepared answers under a stage's initial policy: computed once, kept in the stage's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from orchestrator.dataloader.batch import Batch
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import sync_folder
from orchestrator.run_state.stage_context import training_stage
from orchestrator.training.objectives import document_logprobs
from orchestrator.training.recipe import Session

NAME = "logprobs_D"


class Reference:
    """Summed log-probabilities of the trained tokens of every document of some rows, under the initial policy."""

    def __init__(self, known: dict[str, torch.Tensor]) -> None:
        self._known = known

    def of(self, batch: Batch) -> torch.Tensor:
        """Values of a batch's documents, in order."""
        logprobs_D = self._known[batch.digest]
        return logprobs_D[list(batch.document_ids)]


def no_reference(batch: Batch) -> torch.Tensor:
    """Reference of losses that do not use one."""
    return torch.zeros(len(batch.documents))


class Scored(Protocol):
    """Rows whose documents are scored."""

    digest: str

    @property
    def rows(self) -> int: ...
    @property
    def document_offsets(self) -> Any: ...
    def batch(self, indices: Sequence[int]) -> Batch: ...


def make_reference(session: Session) -> Reference:
    """Score training and held-out rows; every rank calls it while the model is still the one the stage starts from."""
    return keep_reference(session, [session.rows] if session.held is None else [session.rows, session.held])


def keep_reference(session: Session, sets: Sequence[Scored]) -> Reference:
    """Score these rows; every rank calls it while the model is still the one the stage starts from."""
    folder = session.context.folder.reference
    known = {rows.digest: _kept(session, rows, folder / f"{rows.digest}.safetensors") for rows in sets}
    return Reference(known)


def _kept(session: Session, rows: Scored, file: Path) -> torch.Tensor:
    there = session.runtime.sum_over_ranks([float(file.exists())])[0] > 0
    if not there:
        has_begun = session.context.folder.checkpoints.is_dir() and any(session.context.folder.checkpoints.iterdir())
        if has_begun:
            raise CheckpointError(
                f"{file} is missing, and the model has been trained since: restart the stage without its checkpoints/"
            )
        logprobs_D = _score(session, rows)
        if session.runtime.is_main:
            _write(logprobs_D, file)
        session.runtime.barrier()
        return logprobs_D
    try:
        return load_file(file)[NAME]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _write(logprobs_D: torch.Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    save_file({NAME: logprobs_D}, temporary)
    temporary.replace(file)
    sync_folder(file.parent)


@torch.no_grad()
def _score(session: Session, rows: Scored) -> torch.Tensor:
    """Score all documents, split over the ranks, with the same number of forward passes on each."""
    runtime, model = session.runtime, session.model
    micro_size = training_stage(session.context).batch.micro_size
    session.record.log(f"scoring {rows.rows:,} rows once with the reference policy, the model the stage starts from")
    logprobs_D = torch.zeros(len(rows.document_offsets) - 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for first in range(0, rows.rows, micro_size * runtime.world_size):
        begin = first + runtime.rank * micro_size
        indices = [index if index < rows.rows else -1 for index in range(begin, begin + micro_size)]
        batch = rows.batch(indices).to(runtime.device)
        scored_D, _ = document_logprobs(runtime, model, batch)
        if batch.document_ids:
            logprobs_D[list(batch.document_ids)] = scored_D.double().cpu()
    model.train(was_training)
    if runtime.world_size > 1:
        shared = logprobs_D.to(runtime.device)
        dist.all_reduce(shared)
        logprobs_D = shared.cpu()
    return logprobs_D.float()

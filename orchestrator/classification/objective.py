"""A classifier's loss over micro-batches, its predictions of all rows of a set, and the objective of its proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from orchestrator.classification.classes import Classes, Targets, documents_of_batch, targets_of
from orchestrator.classification.model import document_answers
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.passes import passes
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.dataloader.protocols import Rows
from orchestrator.distributed.runtime import Runtime
from orchestrator.losses.classification import class_losses_D
from orchestrator.training.objectives import Objective


def classify_objective(runtime: Runtime, classes: Classes, targets: Mapping[str, Targets]) -> Objective:
    """The mean loss over labelled documents; `targets` by the digest of their rows."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        logits_DC, _ = document_answers(runtime, model, batch)
        has_D = documents_of_batch(batch, lambda digest: targets[digest].has_label_D)
        wanted = documents_of_batch(batch, lambda digest: targets[digest].of_D)
        loss_D = class_losses_D(logits_DC[has_D], wanted[has_D], problem=classes.problem)
        loss = loss_D.sum() + 0.0 * logits_DC.sum()
        if classes.problem != "single_label":
            return (loss,)
        return loss, (logits_DC[has_D].argmax(1) == wanted[has_D]).sum().float()

    def weight(rows: Rows, indices: Sequence[int]) -> float:
        assert isinstance(rows, PreparedRows)
        return targets[rows.digest].labelled_in(rows, indices)

    measures = ("accuracy",) if classes.problem == "single_label" else ()
    return Objective(terms=terms, weight=weight, measures=measures)


def labelled_objective(runtime: Runtime, classes: Classes, rows: PreparedRows) -> Objective:
    """The objective over one set of rows, from its files and the class names alone."""
    return classify_objective(runtime, classes, {rows.digest: targets_of(rows, classes)})


@torch.no_grad()
def all_logits_DC(
    runtime: Runtime,
    model: torch.nn.Module,
    rows: PreparedRows,
    *,
    outputs: int,
    micro_size: int,
    limit: int | None = None,
) -> torch.Tensor:
    """Logits of every document of the set, fp32 on the host (with `limit`, zeros after the first rows); every rank
    calls it and gets all.
    """
    count = rows.rows if limit is None else min(limit, rows.rows)
    logits_DC = torch.zeros(len(rows.document_offsets) - 1, outputs)
    was_training = model.training
    model.eval()
    for indices, done in passes(runtime, rows, range(count), micro_size=micro_size):
        batch = rows.batch(indices).to(runtime.device)
        answers_DC, _ = document_answers(runtime, model, batch)
        if batch.document_ids:
            logits_DC[list(batch.document_ids)] = answers_DC.cpu()
        runtime.phases.advance(done, count)
    model.train(was_training)
    if runtime.world_size > 1:
        shared = logits_DC.to(runtime.device)
        dist.all_reduce(shared)
        logits_DC = shared.cpu()
    return logits_DC

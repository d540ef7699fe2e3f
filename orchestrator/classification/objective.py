"""A classifier's loss over micro-batches, its predictions of all rows of a set, and how they are judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.classification.classes import Classes, Targets, documents_of_batch, targets_of
from orchestrator.classification.metrics import multi_label_report, regression_report, single_label_report
from orchestrator.classification.model import document_answers
from orchestrator.data.encoding.tokenizer import core_tokenizer, load_facts
from orchestrator.dataloader.batch import Batch, PreparedRows
from orchestrator.dataloader.passes import passes
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import DataError
from orchestrator.losses.classification import class_losses_D
from orchestrator.rewards.builtin import Sample
from orchestrator.training.evaluation import Evaluation, evaluate
from orchestrator.training.objectives import Objective, Rows
from orchestrator.training.session import PROOF_ROWS, Session


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
    """Over one set of rows, from its files and the names of the classes alone."""
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
    """fp32 on the host, of every document of the set, or of its first `limit` rows (zeros then for the others'); every rank
    calls it and gets all."""
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


def class_report(
    runtime: Runtime,
    model: torch.nn.Module,
    rows: PreparedRows,
    *,
    classes: Classes,
    micro_size: int,
    limit: int,
    field: str,
) -> dict[str, Any]:
    """Rows, loss, measures and the report of the problem, over the labelled of the first `limit` rows; `field` is the set's key.

    DataError where none of them has a label.
    """
    targets = first_targets(rows, classes, limit)
    if not bool(targets.has_label_D.any()):
        raise DataError(f"{field}: none of the first {min(limit, rows.rows)} rows has a label to score by")
    logits_DC = all_logits_DC(runtime, model, rows, outputs=classes.outputs, micro_size=micro_size, limit=limit)
    return judged(logits_DC, targets, classes)[2]


def first_targets(rows: PreparedRows, classes: Classes, limit: int) -> Targets:
    """Targets of which those behind the first `limit` rows count as unlabelled."""
    targets = targets_of(rows, classes)
    is_seen_D = torch.arange(len(targets.has_label_D)) < limit
    return replace(targets, has_label_D=targets.has_label_D & is_seen_D)


def judged(
    logits_DC: torch.Tensor, targets: Targets, classes: Classes
) -> tuple[float, dict[str, float], dict[str, Any]]:
    """(loss, measures, report) over the documents that have a label. Several classes at once: those over one half."""
    has_D = targets.has_label_D
    wanted, logits = targets.of_D[has_D], logits_DC[has_D]
    loss = float(class_losses_D(logits.double(), _as_loss_wants(wanted), problem=classes.problem).mean())
    match classes.problem:
        case "single_label":
            measures, report = single_label_report(wanted.numpy(), logits.argmax(1).numpy(), classes.names)
        case "multi_label":
            measures, report = multi_label_report(wanted.long().numpy(), (logits > 0).long().numpy(), classes.names)
        case "regression":
            measures, report = regression_report(wanted.double().numpy(), logits[:, 0].double().numpy())
    return loss, measures, {"rows": int(has_D.sum()), "loss": loss, **measures, **report}


def _as_loss_wants(wanted: torch.Tensor) -> torch.Tensor:
    return wanted.double() if wanted.is_floating_point() else wanted


class Judge:
    """Scores the model on held-out rows; keeps the last report."""

    def __init__(self, session: Session, classes: Classes, targets: Mapping[str, Targets]) -> None:
        self._session, self._classes, self._targets = session, classes, targets
        self.report: dict[str, Any] | None = None
        held = session.held
        if held is not None and not bool(targets[held.digest].has_label_D.any()):
            raise DataError(
                f"stages.{session.context.name}.data.eval: no held-out row has a label; give a labelled file as data.eval.path"
            )

    def score(self) -> Evaluation | None:
        """Every rank calls it."""
        held, context = self._session.held, self._session.context
        if held is None:
            return None
        logits_DC = all_logits_DC(
            self._session.runtime,
            self._session.model,
            held,
            outputs=self._classes.outputs,
            micro_size=context.stage.batch.micro_size,
        )
        loss, measures, self.report = judged(logits_DC, self._targets[held.digest], self._classes)
        return Evaluation(loss=loss, trained_tokens=0, rows=held.rows, measures=measures)

    def answers(self) -> list[Sample]:
        """The predicted classes of the first held-out rows as completions, for the user's own metrics; every rank calls it."""
        held, context, runtime = self._session.held, self._session.context, self._session.runtime
        assert held is not None, "metrics without held-out rows are refused by the rules"
        count = min(context.stage.metrics.rows, held.rows)
        micro_size = context.stage.batch.micro_size
        logits_DC = all_logits_DC(
            runtime, self._session.model, held, outputs=self._classes.outputs, micro_size=micro_size, limit=count
        )
        tokenizer = core_tokenizer(load_facts(context.base_folder).core)

        def sample(index: int) -> Sample:
            document = held.document_of(index)
            return Sample(
                prompt=tokenizer.decode(held.document_ids(document).tolist(), skip_special_tokens=True),
                completion=self._classes.in_words(logits_DC[document]),
                tokens=0,
                is_finished=True,
                row=json.loads(held.extra(held.unit_of(document)) or "{}"),
            )

        return [sample(index) for index in range(runtime.rank, count, runtime.world_size)]

    def summary(self) -> dict[str, Any]:
        """What result.json tells of the last judgement."""
        return {
            "classification": {"problem": self._classes.problem, "names": self._classes.names, "held_out": self.report}
        }


def session_targets(session: Session, classes: Classes) -> dict[str, Targets]:
    """Of train and held-out rows, by digest."""
    sets = [session.rows] if session.held is None else [session.rows, session.held]
    return {rows.digest: targets_of(rows, classes) for rows in sets}


def classifier_proof(session: Session, objective: Objective) -> Evaluation:
    """The trainer's own score of what the re-opened artifact is scored on: held-out rows, or the first train rows."""
    rows = session.held or session.rows
    limit = proof_rows(objective, rows, PROOF_ROWS)
    micro_size = session.context.stage.batch.micro_size
    return evaluate(session.runtime, session.model, objective, rows, micro_size=micro_size, limit=limit)


def proof_rows(objective: Objective, rows: PreparedRows, count: int) -> int:
    """How many of the first rows a proof scores: `count`, or more where the first label stands behind them; there is one."""
    return max(count, 1 + next(index for index in range(rows.rows) if objective.weight(rows, [index])))

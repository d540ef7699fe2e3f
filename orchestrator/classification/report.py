"""How a classifier is evaluated during training, and proven."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from orchestrator.classification.classes import Classes, Targets, targets_of
from orchestrator.classification.metrics import multi_label_report, regression_report, single_label_report
from orchestrator.classification.objective import all_logits_DC
from orchestrator.data.encoding.tokenizer import load_tokenizer
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import DataError
from orchestrator.losses.classification import class_losses_D
from orchestrator.rewards.builtin import Sample
from orchestrator.run_state.stage_context import training_stage
from orchestrator.training.evaluation import Evaluation, evaluate
from orchestrator.training.objectives import Objective
from orchestrator.training.recipe import PROOF_ROWS, Session


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
    """Rows, loss, measures and report over the labelled among the first `limit` rows; `field` is the set's key.

    DataError if none of them has a label.
    """
    targets = first_targets(rows, classes, limit)
    if not bool(targets.has_label_D.any()):
        raise DataError(f"{field}: none of the first {min(limit, rows.rows)} rows has a label to score against")
    logits_DC = all_logits_DC(runtime, model, rows, outputs=classes.outputs, micro_size=micro_size, limit=limit)
    return judged(logits_DC, targets, classes)[2]


def first_targets(rows: PreparedRows, classes: Classes, limit: int) -> Targets:
    """Targets in which rows after the first `limit` count as unlabelled."""
    targets = targets_of(rows, classes)
    is_seen_D = torch.arange(len(targets.has_label_D)) < limit
    return replace(targets, has_label_D=targets.has_label_D & is_seen_D)


def judged(
    logits_DC: torch.Tensor, targets: Targets, classes: Classes
) -> tuple[float, dict[str, float], dict[str, Any]]:
    """(loss, measures, report) over the labelled documents. Multi-label predictions are the classes over one half."""
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


class ClassificationEvaluator:
    """Evaluates the model on held-out rows; keeps the last report."""

    def __init__(self, session: Session, classes: Classes, targets: Mapping[str, Targets]) -> None:
        self._session, self._classes, self._targets = session, classes, targets
        self.report: dict[str, Any] | None = None
        held = session.held
        if held is not None and not bool(targets[held.digest].has_label_D.any()):
            raise DataError(
                f"stages.{session.context.name}.data.eval: no held-out row has a label; give a labelled file as data.eval.path"
            )

    def score(self) -> Evaluation | None:
        """Evaluate; every rank calls it."""
        held, context = self._session.held, self._session.context
        if held is None:
            return None
        logits_DC = all_logits_DC(
            self._session.runtime,
            self._session.model,
            held,
            outputs=self._classes.outputs,
            micro_size=training_stage(context).batch.micro_size,
        )
        loss, measures, self.report = judged(logits_DC, self._targets[held.digest], self._classes)
        return Evaluation(loss=loss, trained_tokens=0, rows=held.rows, measures=measures)

    def answers(self) -> list[Sample]:
        """Predicted classes of the first held-out rows, as completions for the user's metrics; every rank calls it."""
        held, context, runtime = self._session.held, self._session.context, self._session.runtime
        assert held is not None, "metrics without held-out rows are refused by the rules"
        count = min(training_stage(context).metrics.rows, held.rows)
        micro_size = training_stage(context).batch.micro_size
        logits_DC = all_logits_DC(
            runtime, self._session.model, held, outputs=self._classes.outputs, micro_size=micro_size, limit=count
        )
        tokenizer = load_tokenizer(context.base_folder)

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
        """The last report's entries in result.json."""
        return {
            "classification": {"problem": self._classes.problem, "names": self._classes.names, "held_out": self.report}
        }


def session_targets(session: Session, classes: Classes) -> dict[str, Targets]:
    """Targets of training and held-out rows, by digest."""
    sets = [session.rows] if session.held is None else [session.rows, session.held]
    return {rows.digest: targets_of(rows, classes) for rows in sets}


def classifier_proof(session: Session, objective: Objective) -> Evaluation:
    """The trainer's own score on the rows that the proof scores: held-out rows, else the first training rows."""
    rows = session.held or session.rows
    limit = proof_rows(objective, rows, PROOF_ROWS)
    micro_size = training_stage(session.context).batch.micro_size
    return evaluate(session.runtime, session.model, objective, rows, micro_size=micro_size, limit=limit)


def proof_rows(objective: Objective, rows: PreparedRows, count: int) -> int:
    """Number of rows a proof scores: `count`, or more if the first label comes later; at least one row has a label."""
    return max(count, 1 + next(index for index in range(rows.rows) if objective.weight(rows, [index])))

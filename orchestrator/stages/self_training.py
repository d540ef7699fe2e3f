"""Self-training: a classifier trains on its own soft labels of weakly labelled and unlabelled rows (COSINE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from orchestrator.classification.model import build_classifier, refuse_other_rows, stage_classes
from orchestrator.classification.objective import classify_objective
from orchestrator.classification.pseudo_labels import PseudoLabels, weak_label_quality
from orchestrator.classification.report import ClassificationEvaluator, classifier_proof, session_targets
from orchestrator.classification.self_training import self_training_objective, uniform_objective
from orchestrator.config.classification import SelfTrainingStage
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import ConfigError
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.evaluation import evaluate
from orchestrator.training.recipe import Recipe, Session
from orchestrator.training.session import run_training, supervised_recipe


def make_recipe(session: Session) -> Recipe:
    """Weighted divergence from the period's pseudo-labels, evaluated on held-out labels."""
    context, runtime = session.context, session.runtime
    stage = cast("SelfTrainingStage", context.stage)
    classes = stage_classes(context)
    if classes.problem != "single_label":
        raise ConfigError(
            f"stages.{context.name}: pseudo-labels are one class of several, its classifier learnt problem={classes.problem}"
        )
    targets = session_targets(session, classes)
    weak = weak_label_quality(targets[session.rows.digest])
    session.record.event("weak_labels", **weak)
    session.record.log("weak labels: " + ", ".join(f"{name} {value:.3f}" for name, value in weak.items()))
    labels = PseudoLabels(session, stage, classes, targets[session.rows.digest])
    judge = ClassificationEvaluator(session, classes, targets)
    proof_objective = classify_objective(runtime, classes, targets)
    probe, micro_size, count = uniform_objective(runtime), stage.batch.micro_size, stage.checkpoint.probe_rows

    def summary() -> Mapping[str, Any]:
        return judge.summary() | {"weak_labels": weak, "pseudo_labels": labels.periods}

    return replace(
        supervised_recipe(session, self_training_objective(runtime, stage, labels.of)),
        score=judge.score,
        answers=judge.answers,
        probe=(lambda: evaluate(runtime, session.model, probe, session.rows, micro_size=micro_size, limit=count).loss)
        if count
        else None,
        proof=lambda: classifier_proof(session, proof_objective),
        before_step=labels.before_step,
        summary=summary,
    )


def run(context: StageContext) -> int:
    """Train, write, prove and report; return the exit code of the rank."""
    refuse_other_rows(PreparedRows.open(context.train_data), f"stages.{context.name}.data.train")
    return run_training(context, make_recipe, build_model=build_classifier)

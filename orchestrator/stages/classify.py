"""A classifier: a new head, and as much of the model as `tuning` selects, trained on labelled texts."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.classification.model import build_classifier, refuse_other_rows, stage_classes
from orchestrator.classification.objective import classify_objective
from orchestrator.classification.report import ClassificationEvaluator, classifier_proof, session_targets
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.recipe import Recipe, Session
from orchestrator.training.session import run_training, supervised_recipe


def make_recipe(session: Session) -> Recipe:
    """Cross-entropy (or its equivalent) over labelled prepared rows, evaluated by the metrics of the problem."""
    classes = stage_classes(session.context)
    targets = session_targets(session, classes)
    judge = ClassificationEvaluator(session, classes, targets)
    objective = classify_objective(session.runtime, classes, targets)
    session.record.log(f"classes: {', '.join(classes.names) or 'none, a number is predicted'}")
    return replace(
        supervised_recipe(session, objective),
        score=judge.score,
        answers=judge.answers,
        proof=lambda: classifier_proof(session, objective),
        summary=judge.summary,
    )


def run(context: StageContext) -> int:
    """Train, write, prove and report; return the exit code of the rank."""
    refuse_other_rows(PreparedRows.open(context.train_data), f"stages.{context.name}.data.train")
    return run_training(context, make_recipe, build_model=build_classifier)

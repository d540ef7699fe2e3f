"""Supervised fine-tuning: from a base model and prepared rows to a proven artifact."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from orchestrator.config.data import DataFormat
from orchestrator.data.formats.trainable import format_problem
from orchestrator.errors import DataError
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.objectives import sft_objective
from orchestrator.training.recipe import Recipe, Session
from orchestrator.training.session import run_training, supervised_recipe


def make_recipe(session: Session) -> Recipe:
    """Next-token loss over the prepared rows, which is also the proof's score.

    DataError if they contain nothing to train on: for hub data sets the plan has seen no rows.
    """
    problem = format_problem(
        session.context.stage,
        cast("DataFormat", session.rows.meta.format),
        None,
        field=f"stages.{session.context.name}.data.train",
    )
    if problem is not None:
        raise DataError(problem)
    return replace(supervised_recipe(session, sft_objective(session.runtime)), is_proof_scored=True)


def run(context: StageContext) -> int:
    """Train, write and prove; return the exit code of the rank."""
    return run_training(context, make_recipe)

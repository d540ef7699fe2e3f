"""A reward model: a scalar head trained on pairs, and a report of what it learnt beyond length and single words."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from orchestrator.alignment.reward_report import held_out_scores, make_report, report_fields
from orchestrator.config.alignment import RewardStage
from orchestrator.errors import DataError
from orchestrator.models.tuning import build_reward_model
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.evaluation import Evaluation
from orchestrator.training.objectives import reward_objective
from orchestrator.training.recipe import Recipe, Session
from orchestrator.training.session import run_training, supervised_recipe


def make_recipe(session: Session) -> Recipe:
    """Bradley-Terry loss over prepared pairs, and the report on held-out ones."""
    stage = cast("RewardStage", session.context.stage)
    if session.rows.meta.kind != "pair":
        raise DataError(
            f"stages.{session.context.name}.data: rows of format {session.rows.meta.format} are not pairs; a reward model "
            "needs format=preference (chosen, rejected)"
        )
    recipe = supervised_recipe(session, reward_objective(session.runtime, stage))

    def proof() -> Evaluation:
        """After the last step every rank arrives here, so all held-out pairs are scored at this point."""
        scores.append(held_out_scores(session))
        return recipe.proof()

    scores: list[np.ndarray] = []
    return replace(recipe, proof=proof, summary=lambda: report_fields(make_report(session, stage, scores[-1])))


def run(context: StageContext) -> int:
    """Train, write, prove and report; return the exit code of the rank."""
    return run_training(context, make_recipe, build_model=build_reward_model)

"""Preference optimisation without a reward model: DPO, IPO, hinge, ORPO, SimPO over pairs, KTO over labelled rows."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from orchestrator.alignment.kto_divergence import Divergence
from orchestrator.alignment.preference_objectives import kto_objective, preference_objective
from orchestrator.alignment.reference_logprobs import make_reference, no_reference
from orchestrator.config.alignment import DpoStage
from orchestrator.errors import DataError
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.objectives import Objective
from orchestrator.training.recipe import Recipe, Session
from orchestrator.training.session import run_training, supervised_recipe


def make_recipe(session: Session) -> Recipe:
    """The stage's loss over prepared pairs or labelled rows, relative to the policy that it starts from."""
    stage = cast("DpoStage", session.context.stage)
    wanted, data_format = ("feedback", "feedback") if stage.loss == "kto" else ("pair", "preference")
    if session.rows.meta.kind != wanted:
        raise DataError(
            f"stages.{session.context.name}.data: loss={stage.loss} needs rows of format {data_format}, "
            f"these are of format {session.rows.meta.format}"
        )
    if stage.loss == "kto":
        return _kto(session, stage)
    return supervised_recipe(session, _paired(session, stage))


def _paired(session: Session, stage: DpoStage) -> Objective:
    reference_of = make_reference(session).of if stage.needs_reference else no_reference
    return preference_objective(session.runtime, stage, reference_of)


def _kto(session: Session, stage: DpoStage) -> Recipe:
    """The KL is estimated before every step, from answers paired with other prompts."""
    divergence = Divergence(session)
    objective = kto_objective(session.runtime, stage, make_reference(session).of, divergence.value)
    recipe = supervised_recipe(session, objective)
    return replace(recipe, before_step=lambda step: divergence.measure(recipe.order.global_batch(step - 1)))


def run(context: StageContext) -> int:
    """Train, write and prove; return the exit code of the rank."""
    return run_training(context, make_recipe)

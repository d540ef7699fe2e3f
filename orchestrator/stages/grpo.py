"""Policy optimisation on sampled completions: GRPO, Dr. GRPO, RLOO and REINFORCE with rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from orchestrator.alignment.held_out_rewards import score_held_out
from orchestrator.alignment.policy_objective import policy_objective
from orchestrator.alignment.reference_policy import build_policy_with_reference, reference_policy
from orchestrator.alignment.rewards import make_rewards
from orchestrator.alignment.rollout_rows import RolloutOrder, RolloutRows
from orchestrator.alignment.rollouts import RolloutMaker
from orchestrator.config.alignment import PolicyStage
from orchestrator.errors import DataError
from orchestrator.generation.generator import end_ids_of, make_generate
from orchestrator.generation.greedy_answers import greedy_answers
from orchestrator.metrics.phases import COMPLETIONS, ROLLOUTS
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.evaluation import evaluate
from orchestrator.training.objectives import prompt_objective
from orchestrator.training.recipe import Recipe, Session
from orchestrator.training.session import proof_of, run_training


def make_recipe(session: Session) -> Recipe:
    """Rollouts as training rows, and the clipped surrogate over them."""
    context, runtime, rows = session.context, session.runtime, session.rows
    stage = cast("PolicyStage", context.stage)
    if rows.meta.kind != "prompt":
        raise DataError(
            f"stages.{context.name}.data: rows of format {rows.meta.format} are not prompts; set data.train.format=prompts"
        )
    module = runtime.accelerator.unwrap_model(session.model)
    end_ids = end_ids_of(module, context.base_folder)
    sampler = RolloutMaker(
        session=session,
        stage=stage,
        order=RolloutOrder(stage, prompts=rows.rows, seed=context.config.seeds.data),
        rows=RolloutRows(pad_id=rows.meta.pad_id),
        generate=make_generate(runtime, session.model, end_ids=end_ids, pad_id=rows.meta.pad_id),
        rewards=make_rewards(context, runtime, stage.rewards),
        reference=reference_policy(session, stage),
    )
    probe = prompt_objective(runtime)

    def before_step(step: int) -> Mapping[str, Any]:
        with context.phases.during(ROLLOUTS, unit=COMPLETIONS):
            return sampler.before_step(step)

    micro_size, count = stage.batch.micro_size, stage.checkpoint.probe_rows
    return Recipe(
        objective=policy_objective(runtime, stage),
        rows=sampler.rows,
        order=sampler.order,
        score=lambda: score_held_out(sampler),
        probe=(lambda: evaluate(runtime, session.model, probe, rows, micro_size=micro_size, limit=count).loss)
        if count
        else None,
        proof=lambda: proof_of(session),
        before_step=before_step,
        answers=None if session.held is None else greedy_answers(context, runtime, session.model, session.held),
    )


def build_model(context: StageContext, dtype: torch.dtype, packed: bool) -> torch.nn.Module:
    stage = cast("PolicyStage", context.stage)
    return build_policy_with_reference(context, stage, dtype, packed)


def run(context: StageContext) -> int:
    """Train, write and prove; return the exit code of the rank."""
    return run_training(context, make_recipe, build_model=build_model)

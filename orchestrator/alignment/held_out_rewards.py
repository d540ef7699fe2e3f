"""A policy on held-out prompts: one greedy completion each, scored by the stage's rewards."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from orchestrator.alignment.rewards import Rewards, as_scored
from orchestrator.alignment.rollouts import Sampler
from orchestrator.config.evaluation import EvaluateStage
from orchestrator.dataloader.batch import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.generation.generator import Request, end_ids_of, make_generate, seed_of
from orchestrator.generation.prompts import prompt_of
from orchestrator.run_state.recorder import Context
from orchestrator.training.evaluation import Evaluation

HELD_OUT_PROMPTS = 32


def score_held_out(sampler: Sampler) -> Evaluation | None:
    """Mean reward (as a loss: its negative) and length; every rank calls it. None where nothing is held out."""
    session = sampler.session
    held, runtime = session.held, session.runtime
    if held is None:
        return None
    count = min(held.rows, HELD_OUT_PROMPTS)
    mine = [held.prompt(index) for index in range(runtime.rank, count, runtime.world_size)]
    requests = [Request(prompt=prompt.ids, seed=0) for prompt in mine]
    greedy = sampler.stage.rollout.model_copy(update={"temperature": 0.0})
    completions = sampler.generate(requests, greedy)
    scored = [
        as_scored(session.context, request, completion, prompt.extra)
        for request, completion, prompt in zip(requests, completions, mine, strict=True)
    ]
    sums, _ = sampler.rewards.of(scored) if scored else ([], {})
    tokens = sum(one.sample.tokens for one in scored)
    reward, length = (total / count for total in runtime.sum_over_ranks([sum(sums), float(tokens)]))
    return Evaluation(
        loss=-reward,
        trained_tokens=int(length * count),
        rows=count,
        measures={"reward": reward, "completion_tokens": length},
    )


def generated_rewards(
    context: Context,
    runtime: Runtime,
    model: torch.nn.Module,
    rows: PreparedRows,
    rewards: Rewards,
    stage: EvaluateStage,
) -> dict[str, float]:
    """Mean of every reward, and of the length, over what a model answers to the rows' prompts."""
    module: Any = model
    generate = make_generate(runtime, model, end_ids=end_ids_of(module, context.base_folder), pad_id=rows.meta.pad_id)
    seed = context.config.seeds.data
    prompts = [prompt_of(context, rows, index) for index in range(min(stage.rows, rows.rows))]
    asked = [
        (Request(prompt=ids, seed=seed_of(seed, "evaluate", place, turn)), row)
        for place, (ids, row) in enumerate(prompts)
        for turn in range(stage.rollout.group_size)
    ]
    completions = generate([request for request, _ in asked], stage.rollout)
    scored = [
        as_scored(context, request, completion, row)
        for (request, row), completion in zip(asked, completions, strict=True)
    ]
    sums, apart = rewards.of(scored)
    means = {f"reward_{name}": statistics.fmean(values) for name, values in apart.items()}
    return {
        "reward": statistics.fmean(sums),
        **means,
        "completion_tokens": statistics.fmean(float(one.sample.tokens) for one in scored),
    }

"""Rewards of generated answers."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from orchestrator.alignment.rewards import Rewards
from orchestrator.config.evaluation import EvaluateStage
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.generation.generator import Request, end_ids_of, make_generate, seed_of
from orchestrator.generation.prompts import prompt_of
from orchestrator.generation.samples import as_scored
from orchestrator.run_state.stage_context import StageContext


def generated_rewards(
    context: StageContext,
    runtime: Runtime,
    model: torch.nn.Module,
    rows: PreparedRows,
    rewards: Rewards,
    stage: EvaluateStage,
) -> dict[str, float]:
    """Mean of every reward and of the length, over a model's answers to the prompts of the rows."""
    module: Any = model
    generate = make_generate(runtime, model, end_ids=end_ids_of(module, context.base_folder), pad_id=rows.meta.pad_id)
    seed = context.config.seeds.data
    prompts = [prompt_of(context, rows, index) for index in range(min(stage.rows, rows.rows))]
    asked = [
        (Request(prompt=ids, seed=seed_of(seed, "evaluate", index, turn)), row)
        for index, (ids, row) in enumerate(prompts)
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

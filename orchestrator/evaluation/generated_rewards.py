"""Rewards of generated answers."""

from __future__ import annotations

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
    """Mean of every reward and of the length, over a model's answers to the prompts of the rows.

    Every rank must call it and answers a share of the prompts.
    """
    ends = end_ids_of(runtime.module_of(model), context.base_folder)
    generate = make_generate(runtime, model, end_ids=ends, pad_id=rows.meta.pad_id)
    seed = context.config.seeds.data
    prompts = [prompt_of(context, rows, index) for index in range(min(stage.rows, rows.rows))]
    asked = [
        (Request(prompt=ids, seed=seed_of(seed, "evaluate", index, turn)), row)
        for index, (ids, row) in enumerate(prompts)
        for turn in range(stage.rollout.group_size)
    ]
    turns = runtime.turns(len(asked))
    count, asked = (
        len(asked),
        [asked[turn or 0] for turn in turns],
    )  # equally many: a sharded reward model needs all ranks
    completions = generate([request for request, _ in asked], stage.rollout)
    scored = [
        as_scored(context, request, completion, row)
        for (request, row), completion in zip(asked, completions, strict=True)
    ]
    sums, apart = rewards.of(scored)
    columns = {
        "reward": sums,
        **{f"reward_{name}": values for name, values in apart.items()},
        "completion_tokens": [float(one.sample.tokens) for one in scored],
    }
    real = range(sum(turn is not None for turn in turns))  # what fills up a rank's share comes last
    totals = runtime.sum_over_ranks([sum(values[i] for i in real) for values in columns.values()])
    return {name: total / count for name, total in zip(columns, totals, strict=True)}

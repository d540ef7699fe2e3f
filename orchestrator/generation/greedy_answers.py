"""Greedy answers to the prompts of held-out rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orchestrator.config.rollout import RolloutConfig
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import ConfigError
from orchestrator.generation.generator import Request, end_ids_of, make_generate
from orchestrator.generation.prompts import prompt_of
from orchestrator.generation.samples import as_scored
from orchestrator.rewards.builtin import Sample
from orchestrator.run_state.stage_context import StageContext, training_stage

Answers = Callable[[], list[Sample]]
"""This rank's share of the held-out answers: rows rank, rank + ranks, ...; every rank calls it."""


def greedy_answers(context: StageContext, runtime: Runtime, model: torch.nn.Module, held: PreparedRows) -> Answers:
    """Greedy completions of held-out prompts; `row["answer"]` is the row's own answer if it has one."""
    settings = training_stage(context).metrics
    rollout = RolloutConfig(
        prompts=settings.rows,
        group_size=1,
        passes=1,
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        generate_size=training_stage(context).batch.micro_size,
        engine="batch",
    )

    def answers() -> list[Sample]:
        ends = end_ids_of(runtime.accelerator.unwrap_model(model), context.base_folder)
        generate = make_generate(runtime, model, end_ids=ends, pad_id=held.meta.pad_id)
        mine = range(runtime.rank, min(settings.rows, held.rows), runtime.world_size)
        asked = [prompt_of(context, held, index) for index in mine]
        if not all(ids for ids, _ in asked):
            raise ConfigError(
                f"stages.{context.name}.metrics: held-out rows of plain text have no prompt to answer; leave out functions, "
                "or give rows with prompts as data.eval.path"
            )
        requests = [Request(prompt=ids, seed=0) for ids, _ in asked]
        completions = generate(requests, rollout)
        return [
            as_scored(context, request, completion, row).sample
            for request, completion, (_, row) in zip(requests, completions, asked, strict=True)
        ]

    return answers

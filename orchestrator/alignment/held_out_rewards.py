"""A policy's rewards on held-out prompts: one greedy completion each, scored by the stage's rewards."""

from __future__ import annotations

from orchestrator.alignment.rollouts import RolloutMaker
from orchestrator.generation.generator import Request
from orchestrator.generation.samples import as_scored
from orchestrator.training.evaluation import Evaluation

HELD_OUT_PROMPTS = 32


def score_held_out(sampler: RolloutMaker) -> Evaluation | None:
    """Mean reward (negated, as a loss) and length; every rank calls it. None if nothing is held out."""
    session = sampler.session
    held, runtime = session.held, session.runtime
    if held is None:
        return None
    count = min(held.rows, HELD_OUT_PROMPTS)
    mine = [held.prompt(index) for index in range(runtime.rank, count, runtime.world_size)]
    requests = [Request(prompt=prompt.ids, seed=0) for prompt in mine]
    completions = sampler.generate(requests, sampler.stage.rollout.greedy)
    scored = [
        as_scored(session.context, request, completion, prompt.extra)
        for request, completion, prompt in zip(requests, completions, mine, strict=True)
    ]
    sums, _ = sampler.rewards.of(scored)
    tokens = sum(one.sample.tokens for one in scored)
    reward, length = (total / count for total in runtime.sum_over_ranks([sum(sums), float(tokens)]))
    return Evaluation(
        loss=-reward,
        trained_tokens=int(length * count),
        rows=count,
        measures={"reward": reward, "completion_tokens": length},
    )

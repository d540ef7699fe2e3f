"""Credit assignment of the GRPO family: how much better each completion did than its baseline.

P prompts with G completions each; a rollout is credited as a whole, however it is split over ranks or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from orchestrator.alignment.rollout_rows import ScoredCompletion
from orchestrator.config.alignment import PolicyStage

Baseline = Literal["grpo", "dr_grpo", "rloo", "reinforce"]
"""What a completion's reward is compared with; see `advantages_PG`."""


EPSILON = 1e-4
"""Added to a group's standard deviation (TRL's value), so that a group of equal rewards has advantages of 0."""


def advantages_PG(rewards_PG: torch.Tensor, *, kind: Baseline) -> torch.Tensor:
    """How much better each completion did than its baseline. rewards_PG: those of the *global* batch.

    grpo: (r - mean) / (std + 1e-4) in the prompt's group, std with G - 1 as TRL has it (GRPO, 2402.03300, 4.1.2).
    dr_grpo: r - mean of the group (2503.20783). rloo: r - mean of the *others* in the group, which is
    G / (G - 1) (r - mean) (2402.14740). reinforce: r - mean of the whole batch, the completion itself included.
    All but reinforce need two completions a prompt.
    """
    _, num_completions = rewards_PG.shape
    assert kind == "reinforce" or num_completions > 1, f"{kind} compares completions of a prompt: {rewards_PG.shape}"
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if kind == "grpo":
        return centred_PG / (rewards_PG.std(dim=1, keepdim=True) + EPSILON)
    if kind == "dr_grpo":
        return centred_PG
    if kind == "rloo":
        return centred_PG * (num_completions / (num_completions - 1))
    return rewards_PG - rewards_PG.mean()


def with_advantages(sequences: Sequence[ScoredCompletion], stage: PolicyStage) -> list[ScoredCompletion]:
    """The sequences of a whole rollout with their advantages; under k1 the KL is part of the reward."""
    rewards = [one.reward - _penalty(one, stage) for one in sequences]
    rewards_PG = torch.tensor(rewards, dtype=torch.float64).reshape(-1, stage.rollout.group_size)
    advantages = advantages_PG(rewards_PG, kind=stage.advantage).reshape(-1).tolist()
    return [replace(one, advantage=advantage) for one, advantage in zip(sequences, advantages, strict=True)]


def _penalty(one: ScoredCompletion, stage: PolicyStage) -> float:
    if stage.kl_estimator != "k1" or not stage.kl_coefficient:
        return 0.0
    return stage.kl_coefficient * (sum(one.old) - sum(one.reference))

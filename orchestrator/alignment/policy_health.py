"""The health of a policy as seen in its rollouts, and the limits beyond which a stage is aborted: pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.alignment.rollout_rows import ScoredCompletion
from orchestrator.config.alignment import PolicyStage
from orchestrator.training.correlations import pearson

SAME = 1e-9
"""Rewards of a group that differ by less are considered equal."""


@dataclass(frozen=True, kw_only=True)
class PolicyHealth:
    """Health after one rollout, with the history that the limits need."""

    metrics: dict[str, Any]
    """Its columns in the row of metrics."""
    first_length: float
    """Mean completion length of the stage's first rollout."""
    first_reward: float
    streaks: dict[str, int] = field(default_factory=dict[str, int])
    """Consecutive rollouts beyond each limit."""


def health_of(
    sequences: Sequence[ScoredCompletion], stage: PolicyStage, *, before: PolicyHealth | None
) -> PolicyHealth:
    """The health after a rollout that follows `before`."""
    size = stage.rollout.group_size
    rewards = [one.reward for one in sequences]
    groups = [rewards[first : first + size] for first in range(0, len(rewards), size)]
    tokens = sum(len(one.completion) for one in sequences)
    length = tokens / len(sequences)
    names = list(sequences[0].rewards)
    metrics: dict[str, Any] = {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        **{f"reward_{name}": statistics.fmean(one.rewards[name] for one in sequences) for name in names},
        "kl": statistics.fmean(sum(one.old) - sum(one.reference) for one in sequences)
        if _has_reference(stage)
        else None,
        "entropy": sum(one.entropy for one in sequences) / tokens,
        "completion_tokens": length,
        "finished_share": statistics.fmean(float(one.is_finished) for one in sequences),
        "equal_groups_share": statistics.fmean(float(max(group) - min(group) < SAME) for group in groups),
        "generator_difference": sum(_differences(one) for one in sequences) / tokens,
        "reward_length_correlation": _correlation(rewards, [float(len(one.completion)) for one in sequences]),
    }
    first_length = length if before is None else before.first_length
    first_reward = metrics["reward"] if before is None else before.first_reward
    streaks = {} if before is None else before.streaks
    beyond = _beyond(metrics, stage, first_length=first_length, first_reward=first_reward)
    return PolicyHealth(
        metrics=metrics,
        first_length=first_length,
        first_reward=first_reward,
        streaks={name: streaks.get(name, 0) + 1 for name in beyond},
    )


def judge(health: PolicyHealth, stage: PolicyStage) -> str | None:
    """The reason to abort the stage; None if it may continue."""
    metrics, limits = health.metrics, stage.limits
    difference = metrics["generator_difference"]
    if limits.logprob_difference is not None and difference > limits.logprob_difference:
        return (
            f"generator and trainer differ by {difference:.3g} nats per token, {limits.logprob_difference:g} is allowed: they do "
            "not compute the same policy. Likely causes: a different precision or attention, an inactive adapter, a wrong mask"
        )
    for name, streak in health.streaks.items():
        if streak >= limits.patience:
            return f"{_sentence(name, health, stage)}, for {streak} rollouts in a row"
    return None


def _beyond(metrics: dict[str, Any], stage: PolicyStage, *, first_length: float, first_reward: float) -> list[str]:
    limits = stage.limits
    tests = {
        "kl": limits.kl is not None and metrics["kl"] is not None and metrics["kl"] > limits.kl,
        "length": limits.length_growth is not None
        and metrics["completion_tokens"] > limits.length_growth * first_length
        and metrics["reward"] > first_reward,
        "entropy": limits.entropy is not None and metrics["entropy"] < limits.entropy,
    }
    return [name for name, is_beyond in tests.items() if is_beyond]


def _sentence(name: str, health: PolicyHealth, stage: PolicyStage) -> str:
    metrics, limits = health.metrics, stage.limits
    match name:
        case "kl":
            return f"the KL to the reference is {metrics['kl']:.3g} nats per completion, limits.kl={limits.kl:g}"
        case "length":
            return (
                f"completions grew from {health.first_length:.0f} to {metrics['completion_tokens']:.0f} tokens while the reward rose "
                f"(correlation of reward and length {metrics['reward_length_correlation']:.2f}): the reward is being hacked by "
                f"length; limits.length_growth={limits.length_growth:g}"
            )
        case _:
            return f"the entropy fell to {metrics['entropy']:.3g} nats per token, limits.entropy={limits.entropy:g}"


def _has_reference(stage: PolicyStage) -> bool:
    return bool(stage.kl_coefficient) or stage.limits.kl is not None


def _differences(one: ScoredCompletion) -> float:
    return sum(abs(old - seen) for old, seen in zip(one.old, one.generator, strict=True))


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation; 0 if either column is constant or nearly so."""
    if statistics.pstdev(first) < SAME or statistics.pstdev(second) < SAME:
        return 0.0
    return pearson(np.array(first), np.array(second)) or 0.0

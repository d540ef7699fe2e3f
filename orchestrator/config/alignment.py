"""Types and ranges of the stages that learn from preferences and rewards. Must not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import (
    Fraction,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from orchestrator.config.functions import FunctionSource
from orchestrator.config.training import TrainingStage


class RewardStage(TrainingStage):
    """A reward model: a scalar head, trained on pairs by the Bradley-Terry loss."""

    kind: Literal["reward"]
    use_margin: bool
    """Require a score difference of at least the row's `margin` (2307.09288, section 3.2.2)."""
    centring: NaturalFloat
    """Weight of (r_chosen + r_rejected)^2, which keeps the scores around zero (2312.09244); 0 disables it."""
    report_pairs: PositiveInt
    """Upper limit of the train pairs that the report's baselines are fitted on."""


REFERENCE_FREE = ("orpo", "simpo")
"""Losses that compare with no reference policy."""


class DpoStage(TrainingStage):
    """Preference optimisation without a reward model."""

    kind: Literal["dpo"]
    loss: Literal["dpo", "ipo", "hinge", "kto", "orpo", "simpo"]
    """DPO 2305.18290, IPO 2310.12036, hinge (SLiC-HF 2305.10425), KTO 2402.01306, ORPO 2403.07691, SimPO 2405.14734."""
    beta: PositiveFloat
    """Strength of the regularisation towards the reference policy (beta); the weight of the odds ratio in ORPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Assumed share of pairs with flipped labels (cDPO); only with loss=dpo."""
    target_margin: NaturalFloat
    """Gamma of SimPO: the margin between the length-normalised rewards."""
    desirable_weight: PositiveFloat
    """Weight of good rows in KTO."""
    undesirable_weight: PositiveFloat
    """Weight of bad rows in KTO."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with the model that the stage starts from."""
        return self.loss not in REFERENCE_FREE


class RewardSource(FunctionSource):
    """One reward of a policy stage."""

    source: Text
    """`stage:NAME` (a reward stage before it), `model:FOLDER` (a sequence-classification folder with one label), a
    built-in function, or `FILE.py:function`."""
    weight: float
    """Weight of this reward in the sum of all rewards."""


class RolloutConfig(Section):
    """How completions are generated."""

    prompts: PositiveInt
    """Prompts of a rollout, over all ranks."""
    group_size: PositiveInt
    """Completions of each prompt."""
    passes: PositiveInt
    """Passes over each rollout; one pass is prompts x group_size / batch.global_size optimizer steps."""
    max_new_tokens: PositiveInt
    """Longest completion, in tokens."""
    temperature: NaturalFloat
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Nucleus sampling: the smallest set of tokens with this total probability; 1 keeps all."""
    top_k: NaturalInt
    """Sample from this many of the likeliest tokens; 0 keeps all."""
    generate_size: PositiveInt
    """Completions that one rank generates at a time."""
    engine: Literal["batch", "continuous"]
    """`batch` waits for the longest of a batch; `continuous` (transformers' continuous batching) refills freed slots
    immediately."""


class PolicyLimits(Section):
    """Limits on the policy's health. Exceeding one for `patience` rollouts in a row fails the stage; its best
    checkpoint is kept.
    """

    patience: PositiveInt
    """Consecutive rollouts."""
    kl: PositiveFloat | None
    """Mean over completions of the summed log-ratio to the reference policy, in nats."""
    length_growth: Annotated[float, Field(gt=1)] | None
    """Mean completion length over that of the first rollout, while the reward rises."""
    entropy: PositiveFloat | None
    """Mean entropy of a sampled token's distribution, in nats; lower values mean collapse."""
    logprob_difference: PositiveFloat | None
    """Mean absolute difference of a token's log-probability between generator and trainer; one rollout above it is
    enough."""


class PolicyStage(TrainingStage):
    """Policy optimisation on sampled completions."""

    kind: Literal["grpo"]
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce"]
    """GRPO 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740, REINFORCE with the batch mean as baseline."""
    aggregation: Literal["token", "sequence", "constant"]
    """Mean over all tokens (DAPO), over the tokens of a sequence and then over sequences (GRPO), or sum over max_new_tokens."""
    clip_low: Fraction
    """The ratio is clipped to 1 - clip_low ... 1 + clip_high."""
    clip_high: PositiveFloat
    """A larger upper than lower bound leaves unlikely tokens room to grow (DAPO, 2503.14476)."""
    kl_coefficient: NaturalFloat
    """Weight of the KL divergence to the reference policy in the loss; 0 disables it."""
    kl_estimator: Literal["k1", "k2", "k3"]
    """k2 and k3 are added to the loss; k1, which has no gradient there, is subtracted from the rewards."""
    rollout: RolloutConfig
    """How completions are generated."""
    rewards: tuple[RewardSource, ...]
    """Rewards that score the completions."""
    accept_weak_reward: bool
    """Accept a reward model whose report does not show that it beats chance."""
    limits: PolicyLimits
    """Limits beyond which the stage fails."""

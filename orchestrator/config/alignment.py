"""Types and ranges of the stages that learn from preferences and rewards. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalFloat, PositiveFloat, PositiveInt, Section
from orchestrator.config.rollout import RewardSource, RolloutConfig
from orchestrator.config.stage import Product, RowKind
from orchestrator.config.training import TrainingStage


class RewardStage(TrainingStage):
    """A reward model: a scalar head, trained on pairs by the Bradley-Terry loss."""

    kind: Literal["reward"]
    makes: ClassVar[Product | None] = "reward model"
    row_kind: ClassVar[RowKind | None] = "pair"
    has_new_head: ClassVar[bool] = True
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
    makes: ClassVar[Product | None] = "policy"
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

    @property
    def scores_reference_first(self) -> bool:
        return self.needs_reference

    @property
    def rows_wanted(self) -> RowKind:
        return "feedback" if self.loss == "kto" else "pair"

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        if self.label_smoothing and self.loss != "dpo":
            yield f"stages.{name}.label_smoothing: only loss=dpo has it, not {self.loss}; set it to 0"


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
    makes: ClassVar[Product | None] = "policy"
    row_kind: ClassVar[RowKind | None] = "prompt"
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

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        return self.rewards

    @property
    def generation(self) -> RolloutConfig:
        return self.rollout

    @property
    def holds_reference(self) -> bool:
        return bool(self.kl_coefficient) or self.limits.kl is not None

    @property
    def requires_proven_rewards(self) -> bool:
        return not self.accept_weak_reward

    def problems(self, name: str, *, ranks: int) -> Iterator[str]:
        field, rollout = f"stages.{name}", self.rollout
        completions = rollout.prompts * rollout.group_size
        if completions % self.batch.global_size:
            yield (
                f"{field}.rollout: prompts x group_size = {rollout.prompts} x {rollout.group_size} = {completions} "
                f"completions is not a multiple of batch.global_size = {self.batch.global_size}"
            )
        if rollout.group_size < 2:
            yield f"{field}.rollout.group_size: advantages compare completions of one prompt; at least 2, not 1"
        if rollout.prompts % ranks:
            yield f"{field}.rollout.prompts: {rollout.prompts} prompts cannot be shared by {ranks} ranks evenly"
        if self.data.packing != "none":
            yield f"{field}.data.packing: prompts are not packed; set packing=none, not {self.data.packing}"
        if not self.rewards:
            yield f"{field}.rewards: there is none; add for example {{source: exact_match, weight: 1.0, options: {{}}}}"

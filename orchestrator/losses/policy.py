"""KL estimates and clipped losses of a policy; knows tensors only: must not import the rest of the orchestrator.

B sequences, T positions.
"""

from __future__ import annotations

from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3"]
"""See `kl_BT`."""

Aggregation = Literal["token", "sequence", "constant"]
"""How the losses of tokens are aggregated; see `aggregate_sum`."""


def kl_BT(logprobs_BT: torch.Tensor, reference_BT: torch.Tensor, *, kind: KlEstimator) -> torch.Tensor:
    """Estimates of KL(policy || reference) in nats from tokens that the policy sampled (joschu.net/blog/kl-approx.html).

    With x = log p_ref - log p: k1 = -x (unbiased), k2 = x^2 / 2 (biased, low variance), k3 = e^x - x - 1 (unbiased, never
    below 0; GRPO, 2402.03300, eq. 4). k1 is for rewards: as a loss its expected gradient is 0.
    """
    log_ratio_BT = reference_BT - logprobs_BT
    if kind == "k1":
        return -log_ratio_BT
    if kind == "k2":
        return log_ratio_BT.square() / 2
    # expm1, because e^x - 1 loses all digits where the two policies are close.
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def policy_token_losses_BT(
    logprobs_BT: torch.Tensor,
    old_logprobs_BT: torch.Tensor,
    advantages_B: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and a mask of the clipped tokens.

    PPO (1707.06347, eq. 7), with two bounds as in DAPO (2503.14476, eq. 8); ratio = p / p_old of the token. A clipped
    token has no gradient: the ratio has already left the bounds in the direction in which the advantage points.
    """
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    advantages_B1 = advantages_B.unsqueeze(1)
    bounded_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    losses_BT = -torch.minimum(ratio_BT * advantages_B1, bounded_BT * advantages_B1)
    too_low_BT = (ratio_BT < 1 - clip_low) & (advantages_B1 < 0)
    too_high_BT = (ratio_BT > 1 + clip_high) & (advantages_B1 > 0)
    return losses_BT, too_low_BT | too_high_BT


def aggregate_sum(
    losses_BT: torch.Tensor, mask_BT: torch.Tensor, *, kind: Aggregation, max_new_tokens: int
) -> torch.Tensor:
    """A micro-batch's part of the loss, before its division by `weight`: the parts of any split add up to the same sum.

    mask_BT: true on completion tokens. token: sum over tokens (DAPO, 2503.14476, eq. 8). sequence: sum over sequences
    of the mean over their tokens (GRPO, 2402.03300, eq. 3). constant: sum over tokens / max_new_tokens (Dr. GRPO,
    2503.20783), the only kind that uses it. A sequence without tokens adds 0.
    """
    losses_B = losses_BT.masked_fill(~mask_BT, 0.0).sum(dim=1)
    if kind == "sequence":
        losses_B = losses_B / mask_BT.sum(dim=1).clamp(min=1)
    if kind == "constant":
        losses_B = losses_B / max_new_tokens
    return losses_B.sum()


def weight(kind: Aggregation, *, num_tokens: int, num_sequences: int) -> int:
    """The divisor of the sum of `aggregate_sum` over all micro-batches and ranks; at least 1.

    Both numbers are of the *global* batch: true positions of the masks, and sequences without the fillers.
    """
    return max(num_tokens if kind == "token" else num_sequences, 1)

"""Losses for preferences and reward models; knows tensors only: must not import the rest of the orchestrator.

N pairs (or rows, in KTO), D documents. Every function returns a loss per pair; the caller sums them, divides by the
pairs of the *global* batch, so that the gradient does not depend on how that batch is split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """What one model assigns to the answers of N pairs."""

    chosen_N: torch.Tensor
    """log p(answer | prompt) in nats: summed over the answer's tokens."""
    rejected_N: torch.Tensor
    chosen_tokens_N: torch.Tensor
    """Tokens that the sum runs over."""
    rejected_tokens_N: torch.Tensor

    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probability per token: chosen_N, rejected_N; 0 for an answer without tokens."""
        return self.chosen_N / self.chosen_tokens_N.clamp(min=1), self.rejected_N / self.rejected_tokens_N.clamp(min=1)


@dataclass(frozen=True, slots=True)
class ImplicitRewards:
    """The rewards that a policy implicitly defines, without gradients."""

    chosen_N: torch.Tensor
    rejected_N: torch.Tensor
    correct_N: torch.Tensor
    """Whether the chosen answer has the higher reward; a tie is not correct. Its mean is the accuracy."""


def pairs_of_documents(logprobs_D: torch.Tensor, tokens_D: torch.Tensor) -> PairLogprobs:
    """The pairs of a batch whose documents are chosen, rejected, chosen, rejected, and so on."""
    assert logprobs_D.shape == tokens_D.shape and len(logprobs_D) % 2 == 0, (logprobs_D.shape, tokens_D.shape)
    return PairLogprobs(logprobs_D[0::2], logprobs_D[1::2], tokens_D[0::2], tokens_D[1::2])


def dpo_N(policy: PairLogprobs, reference: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), with m the margin of the log-ratios: log 2 at step 0.

    DPO (2305.18290, eq. 7); e is the share of labels believed to be flipped (cDPO, ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    # logsigmoid below, not log(sigmoid): the latter is -inf where the sigmoid rounds to 0.
    margin_N = beta * _margin_N(policy, reference)
    return -(1 - label_smoothing) * functional.logsigmoid(margin_N) - label_smoothing * functional.logsigmoid(-margin_N)


def ipo_N(policy: PairLogprobs, reference: PairLogprobs, *, beta: float) -> torch.Tensor:
    """(m - 1 / (2 beta))^2, with m the margin of the log-ratios *per token* (IPO, 2310.12036, eq. 17, tau = beta).

    The paper writes m with sums over tokens, whose square grows with the answer's length. The mean is TRL's convention,
    confirmed there by the paper's authors as the form behind their results; beta is comparable across lengths with it.
    """
    chosen_N, rejected_N = policy.per_token()
    reference_chosen_N, reference_rejected_N = reference.per_token()
    margin_N = (chosen_N - reference_chosen_N) - (rejected_N - reference_rejected_N)
    return (margin_N - 1 / (2 * beta)).square()


def hinge_N(policy: PairLogprobs, reference: PairLogprobs, *, beta: float) -> torch.Tensor:
    """max(0, 1 - beta m), with m the margin of the log-ratios.

    The ranking term of SLiC-HF (2305.10425) against a reference, as in RSO (2309.06657).
    """
    return functional.relu(1 - beta * _margin_N(policy, reference))


def orpo_N(policy: PairLogprobs, *, weight: float) -> torch.Tensor:
    """-log P(chosen) - weight log sigmoid(log odds(chosen) / odds(rejected)), odds(y) = P(y) / (1 - P(y)).

    ORPO (2403.07691, eq. 6 and 7, weight = lambda); needs no reference. P is the geometric mean over the answer's
    tokens, and both terms run over the answer alone.
    """
    chosen_N, rejected_N = policy.per_token()
    return -chosen_N - weight * functional.logsigmoid(_log_odds_N(chosen_N) - _log_odds_N(rejected_N))


def simpo_N(policy: PairLogprobs, *, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma); SimPO (2405.14734, eq. 6).

    Means are over the answer's tokens; gamma is the margin in units of the reward; needs no reference.
    """
    chosen_N, rejected_N = policy.per_token()
    return -functional.logsigmoid(beta * (chosen_N - rejected_N) - gamma)


def kto_N(
    log_ratios_N: torch.Tensor,
    desirable_N: torch.Tensor,
    *,
    kl: torch.Tensor,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """w (1 - sigmoid(beta (r - z))) for desirable rows, w (1 - sigmoid(beta (z - r))) for others; KTO (2402.01306, eq. 7).

    log_ratios_N: r, the policy's summed log-probabilities minus the reference's. kl: z, the mean of r over answers to
    *other* prompts, over the global batch; a negative one counts as 0, and no gradient flows through it.
    weights: (desirable, undesirable).
    """
    above_N = beta * (log_ratios_N - kl.detach().clamp(min=0))
    signed_N = torch.where(desirable_N, above_N, -above_N)
    weights_N = torch.where(desirable_N, weights[0], weights[1]).to(signed_N.dtype)
    return weights_N * torch.sigmoid(-signed_N)


def bradley_terry_N(
    chosen_N: torch.Tensor, rejected_N: torch.Tensor, *, margin_N: torch.Tensor | None = None
) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin): a reward model loss (Llama 2, 2307.09288, eq. 2; 0: no margin)."""
    difference_N = chosen_N - rejected_N
    return -functional.logsigmoid(difference_N if margin_N is None else difference_N - margin_N)


def centring_N(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> torch.Tensor:
    """(r_chosen + r_rejected)^2, which keeps a reward model's scores centred at 0 (2312.09244)."""
    return (chosen_N + rejected_N).square()


def implicit_rewards(policy: PairLogprobs, reference: PairLogprobs, *, beta: float) -> ImplicitRewards:
    """beta (log p - log p_ref) of the chosen and of the rejected answers (DPO, 2305.18290, section 5)."""
    chosen_N = beta * (policy.chosen_N - reference.chosen_N).detach()
    rejected_N = beta * (policy.rejected_N - reference.rejected_N).detach()
    return ImplicitRewards(chosen_N, rejected_N, chosen_N > rejected_N)


def _margin_N(policy: PairLogprobs, reference: PairLogprobs) -> torch.Tensor:
    return (policy.chosen_N - reference.chosen_N) - (policy.rejected_N - reference.rejected_N)


def _log_odds_N(logprobs_N: torch.Tensor) -> torch.Tensor:
    """log P / (1 - P); a P that rounds to 1 is clamped one step below, where its odds are finite."""
    below_one_N = logprobs_N.clamp(max=-torch.finfo(logprobs_N.dtype).eps)
    return below_one_N - torch.log(-torch.expm1(below_one_N))

"""Losses of preferences equal TRL's in value and gradient, agree with finite differences and with their papers' formulas."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from orchestrator.losses.preference import (
    PairLogprobs,
    bradley_terry_N,
    centring_N,
    dpo_N,
    hinge_N,
    implicit_rewards,
    ipo_N,
    kto_N,
    orpo_N,
    pairs_of_documents,
    simpo_N,
)

PAIRS, ANSWER = 5, 7
TOKENS_D = torch.tensor([7, 3, 1, 6, 4, 4, 2, 7, 5, 1])
"""Tokens of the answers: chosen, rejected, chosen, rejected, ..."""
TOLERANCE = 1e-5
BETAS = (0.05, 0.1, 0.5)

Loss = Callable[[PairLogprobs, PairLogprobs], torch.Tensor]

REFERENCED: dict[str, Loss] = {
    **{f"dpo-{beta}": partial(dpo_N, beta=beta) for beta in BETAS},
    **{f"cdpo-{beta}": partial(dpo_N, beta=beta, label_smoothing=0.2) for beta in BETAS},
    **{f"ipo-{beta}": partial(ipo_N, beta=beta) for beta in BETAS},
    **{f"hinge-{beta}": partial(hinge_N, beta=beta) for beta in BETAS},
}
FREE: dict[str, Loss] = {
    **{f"orpo-{weight}": lambda policy, _, weight=weight: orpo_N(policy, weight=weight) for weight in BETAS},
    **{
        f"simpo-{beta}": lambda policy, _, beta=beta: simpo_N(policy, beta=beta, gamma=0.7) for beta in (2.0, 2.5, 10.0)
    },
}
LOSSES = REFERENCED | FREE
TRL_LOSS_TYPES = {"dpo": "sigmoid", "cdpo": "aot", "ipo": "ipo", "hinge": "hinge"}


def test_the_sweep_has_every_loss() -> None:
    assert len(REFERENCED) == 12 and len(FREE) == 6 and len(LOSSES) == 18


class _Accelerator:
    """One process: what is gathered is what there is."""

    device = torch.device("cpu")

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    gather_for_metrics = gather


def _trainer(**settings: Any) -> SimpleNamespace:
    """What TRL's methods read of their trainer, besides the settings of the loss."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
        **settings,
    )


def _mask(tokens_N: torch.Tensor) -> torch.Tensor:
    return torch.arange(ANSWER) < tokens_N[:, None]


def _token_logprobs(seed: int, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Log-probabilities of every token of every answer, 0 past its end; rows chosen, rejected, chosen, ..."""
    values_DT = -torch.rand(2 * PAIRS, ANSWER, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 - 0.05
    return values_DT * _mask(TOKENS_D)


def _pairs(values_DT: torch.Tensor) -> PairLogprobs:
    return pairs_of_documents(values_DT.sum(1), TOKENS_D)


def _chosen_then_rejected(values_D: torch.Tensor) -> torch.Tensor:
    return torch.cat([values_D[0::2], values_D[1::2]])


def _model(logprobs_BT: torch.Tensor) -> Any:
    """Answers as TRL's models with a fused head do."""
    blank_BT = torch.zeros_like(logprobs_BT).detach()
    outputs = SimpleNamespace(log_probs=logprobs_BT, entropy=blank_BT, mean_logits=blank_BT, is_top1=blank_BT.bool())

    class Model:
        training = True

        def __call__(self, **_: Any) -> SimpleNamespace:
            return outputs

    return Model()


def _with_prompt(mask_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """TRL's inputs for answers after a prompt of one token."""
    whole_BT = torch.cat([torch.zeros(len(mask_BT), 1), mask_BT], dim=1).long()
    return {"input_ids": torch.ones_like(whole_BT), "attention_mask": whole_BT, "completion_mask": whole_BT}


def _trl_dpo(
    values_DT: torch.Tensor, reference_D: torch.Tensor, *, loss_type: str, beta: float
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """DPOTrainer._compute_loss itself: its loss and its metrics."""
    from trl import DPOTrainer

    trainer = _trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.2,
        use_weighting=False,
    )
    chosen_N, rejected_N = reference_D[0::2], reference_D[1::2]
    inputs = _with_prompt(_chosen_then_rejected(values_DT) != 0) | {
        "ref_chosen_logps": chosen_N,
        "ref_rejected_logps": rejected_N,
    }
    loss = DPOTrainer._compute_loss(trainer, _model(_chosen_then_rejected(values_DT)), inputs, False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("name", REFERENCED)
def test_trl_computes_the_same_with_a_reference(name: str) -> None:
    """TRL's `aot` sorts the margins of a batch; on one pair at a time it is cDPO, which TRL has no other name for."""
    kind, beta = name.split("-")
    values_DT, reference_DT = _token_logprobs(0).requires_grad_(), _token_logprobs(1)
    ours_N = REFERENCED[name](_pairs(values_DT), _pairs(reference_DT))
    trl = partial(_trl_dpo, loss_type=TRL_LOSS_TYPES[kind], beta=float(beta))
    starts = range(0, 2 * PAIRS, 2)
    theirs = [trl(values_DT[start : start + 2], reference_DT[start : start + 2].sum(1))[0] for start in starts]
    _assert_same(ours_N, torch.stack(theirs), values_DT)
    if kind != "cdpo":
        whole, _ = trl(values_DT, reference_DT.sum(1))
        torch.testing.assert_close(whole, ours_N.mean(), rtol=0, atol=TOLERANCE)


def _assert_same(ours_N: torch.Tensor, theirs_N: torch.Tensor, values: torch.Tensor) -> None:
    """Each loss, and the gradient of each of them at every input."""
    assert ours_N.shape == theirs_N.shape
    torch.testing.assert_close(ours_N, theirs_N.to(ours_N.dtype), rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(ours_N, theirs_N, strict=True):
        (our_gradient,) = torch.autograd.grad(ours, values, retain_graph=True)
        (their_gradient,) = torch.autograd.grad(theirs, values, retain_graph=True)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=TOLERANCE)


def test_trl_gives_the_same_implicit_rewards() -> None:
    values_DT, reference_DT = _token_logprobs(0), _token_logprobs(1)
    rewards = implicit_rewards(_pairs(values_DT.requires_grad_()), _pairs(reference_DT), beta=0.3)
    _, metrics = _trl_dpo(values_DT, reference_DT.sum(1), loss_type="sigmoid", beta=0.3)
    assert not rewards.chosen_N.requires_grad and not rewards.rejected_N.requires_grad
    assert 0 < float(rewards.correct_N.double().mean()) < 1, "the pairs must not all be on one side"
    ours = {"chosen": rewards.chosen_N, "rejected": rewards.rejected_N, "accuracies": rewards.correct_N.double()}
    for name, value_N in ours.items():
        assert metrics[f"rewards/{name}"] == [pytest.approx(float(value_N.mean()), abs=TOLERANCE)]


@pytest.fixture
def experimental(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL keeps these trainers in a package that warns when it is imported."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.usefixtures("experimental")
@pytest.mark.parametrize("weight", BETAS)
def test_trl_computes_the_same_orpo(weight: float) -> None:
    """TRL's own NLL runs over the prompt too; here it is given that of the answer, as in the paper."""
    from trl.experimental.orpo import ORPOTrainer

    values_DT = _token_logprobs(2, dtype=torch.float32).requires_grad_()
    pairs = _pairs(values_DT)
    chosen_N, rejected_N = pairs.per_token()
    trainer = _trainer(beta=weight)
    trainer.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, trainer)
    theirs = []
    for chosen, rejected in zip(chosen_N.split(1), rejected_N.split(1), strict=True):
        forward = (chosen, rejected, chosen, rejected, -chosen.mean())
        trainer.concatenated_forward = lambda *_, forward=forward: forward
        theirs.append(ORPOTrainer.get_batch_loss_metrics(trainer, None, {})[0])
    _assert_same(orpo_N(pairs, weight=weight), torch.stack(theirs), values_DT)


@pytest.mark.usefixtures("experimental")
@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.0), (2.0, 1.0), (2.5, 1.4), (10.0, 3.0)])
def test_trl_computes_the_same_simpo(beta: float, gamma: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    values_DT = _token_logprobs(3).requires_grad_()
    pairs = _pairs(values_DT)
    trainer = _trainer(alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=0.0)
    theirs_N, *_ = CPOTrainer.cpo_loss(trainer, *pairs.per_token())
    _assert_same(simpo_N(pairs, beta=beta, gamma=gamma), theirs_N, values_DT)


@pytest.mark.parametrize("desirable", [[True] * 6, [False] * 6, [True, False, True, True, False, False]])
@pytest.mark.parametrize("kl", [0.8, 0.0, -0.5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.5), (0.5, 2.0)])
def test_trl_computes_the_same_kto(desirable: list[bool], kl: float, weights: tuple[float, float]) -> None:
    from trl import KTOTrainer

    values_NT, reference_N = _token_logprobs(4)[:6].requires_grad_(), _token_logprobs(5)[:6].sum(1)
    desirable_N = torch.tensor(desirable)
    trainer = _trainer(
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda *_: torch.tensor([kl - 0.1, kl + 0.1], dtype=torch.float64),
    )
    inputs = _with_prompt(_mask(TOKENS_D[:6]))
    inputs |= {"label": desirable_N, "ref_logps": reference_N, "ref_KL_logps": torch.zeros(2, dtype=torch.float64)}
    theirs = KTOTrainer._compute_loss(trainer, _model(values_NT), inputs, False)
    kl_tensor = torch.tensor(kl, dtype=torch.float64)
    ours_N = kto_N(values_NT.sum(1) - reference_N, desirable_N, kl=kl_tensor, beta=0.3, weights=weights)
    _assert_same(ours_N.mean()[None], theirs[None], values_NT)


def test_no_gradient_flows_through_the_kl_of_kto() -> None:
    kl = torch.tensor(0.4, requires_grad=True)
    ratios_N = torch.tensor([0.1, -0.2], requires_grad=True)
    kto_N(ratios_N, torch.tensor([True, False]), kl=kl, beta=0.1).sum().backward()
    assert kl.grad is None and ratios_N.grad is not None and bool((ratios_N.grad != 0).all())


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.01, 0.5])
def test_trl_computes_the_same_reward_model_loss(with_margin: bool, centring: float | None) -> None:
    from trl import RewardTrainer

    rewards_B1 = torch.randn(2 * PAIRS, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    rewards_B1.requires_grad_()
    margin_N = torch.tensor([1.0, 2 / 3, 1 / 3, 0.0, 1.0], dtype=torch.float64) if with_margin else None
    trainer = _trainer(
        args=SimpleNamespace(center_rewards_coefficient=centring),
    )
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 3)} | ({"margin": margin_N} if with_margin else {})
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards_B1), inputs)
    chosen_N, rejected_N = rewards_B1.squeeze(1).chunk(2)
    ours_N = bradley_terry_N(chosen_N, rejected_N, margin_N=margin_N) + (centring or 0.0) * centring_N(
        chosen_N, rejected_N
    )
    _assert_same(ours_N.mean()[None], theirs[None], rewards_B1)


@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_agree_with_finite_differences(name: str) -> None:
    reference = _pairs(_token_logprobs(1))
    values_DT = _token_logprobs(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda values_DT: LOSSES[name](_pairs(values_DT), reference), values_DT)


def test_row_and_reward_losses_agree_with_finite_differences() -> None:
    one_N, other_N = torch.randn(2, PAIRS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    one_N.requires_grad_()
    other_N.requires_grad_()
    margin_N = torch.full((PAIRS,), 1 / 3, dtype=torch.float64)
    desirable_N = torch.tensor([True, False, True, False, False])
    kl = torch.tensor(0.2, dtype=torch.float64)
    checks = [
        torch.autograd.gradcheck(lambda one, other: bradley_terry_N(one, other, margin_N=margin_N), (one_N, other_N)),
        torch.autograd.gradcheck(bradley_terry_N, (one_N, other_N)),
        torch.autograd.gradcheck(centring_N, (one_N, other_N)),
        torch.autograd.gradcheck(lambda one: kto_N(one, desirable_N, kl=kl, beta=0.4, weights=(1.0, 1.3)), one_N),
    ]
    assert checks == [True] * 4


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", BETAS)
def test_dpo_starts_at_log_2(beta: float, label_smoothing: float) -> None:
    pairs = _pairs(_token_logprobs(8, dtype=torch.float32))
    losses_N = dpo_N(pairs, pairs, beta=beta, label_smoothing=label_smoothing)
    torch.testing.assert_close(losses_N, torch.full((PAIRS,), math.log(2)), rtol=0, atol=1e-6)
    assert not bool(implicit_rewards(pairs, pairs, beta=beta).correct_N.any()), "a tie is not correct"


def test_the_other_losses_start_at_their_papers_values() -> None:
    pairs = _pairs(_token_logprobs(8))
    ones_N = torch.ones(PAIRS, dtype=torch.float64)
    torch.testing.assert_close(hinge_N(pairs, pairs, beta=0.1), ones_N)
    torch.testing.assert_close(ipo_N(pairs, pairs, beta=0.1), 25 * ones_N)
    same_N = kto_N(0 * ones_N, ones_N.bool(), kl=torch.tensor(0.0, dtype=torch.float64), beta=0.1)
    torch.testing.assert_close(same_N, ones_N / 2)


def test_ipo_does_not_depend_on_the_length_of_an_answer() -> None:
    """Twice the tokens with the same log-probability each: the same loss, unlike with sums."""
    short_D, tokens_D = torch.tensor([-2.0, -3.0]), torch.tensor([2, 2])
    policy, longer = pairs_of_documents(short_D, tokens_D), pairs_of_documents(2 * short_D, 2 * tokens_D)
    reference, longer_reference = (
        pairs_of_documents(count * torch.tensor([-2.5, -2.5]), tokens_D * count) for count in (1, 2)
    )
    torch.testing.assert_close(ipo_N(policy, reference, beta=0.1), ipo_N(longer, longer_reference, beta=0.1))
    assert float(dpo_N(policy, reference, beta=0.1)) != float(dpo_N(longer, longer_reference, beta=0.1))


def test_orpo_is_the_papers_formula() -> None:
    """Independent of TRL: eq. 6 and 7 of 2403.07691 written with probabilities, in float64."""
    pairs = _pairs(_token_logprobs(9))
    probabilities = [logprobs_N.exp() for logprobs_N in pairs.per_token()]
    chosen_odds_N, rejected_odds_N = (probability_N / (1 - probability_N) for probability_N in probabilities)
    ratio_N = chosen_odds_N / rejected_odds_N
    expected_N = -probabilities[0].log() - 0.25 * torch.log(1 / (1 + 1 / ratio_N))
    torch.testing.assert_close(orpo_N(pairs, weight=0.25), expected_N, rtol=0, atol=1e-10)


def test_orpo_of_certain_answers_is_finite() -> None:
    logprobs_D = torch.tensor([0.0, -1e-9, -50.0, 0.0]).requires_grad_()
    losses_N = orpo_N(pairs_of_documents(logprobs_D, torch.ones(4)), weight=0.1)
    losses_N.sum().backward()
    assert bool(losses_N.isfinite().all()) and bool(logprobs_D.grad.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_a_split_of_the_pairs_has_the_same_gradient(name: str) -> None:
    reference_DT = _token_logprobs(1)

    def gradient(sizes: list[int]) -> torch.Tensor:
        values_DT = _token_logprobs(0).requires_grad_()
        rows = [2 * size for size in sizes]
        parts = zip(values_DT.split(rows), reference_DT.split(rows), TOKENS_D.split(rows), strict=True)
        for values, reference, tokens in parts:
            policy, base = (pairs_of_documents(part.sum(1), tokens) for part in (values, reference))
            (LOSSES[name](policy, base).sum() / PAIRS).backward()
        assert values_DT.grad is not None
        return values_DT.grad

    torch.testing.assert_close(gradient([5]), gradient([1, 3, 1]), rtol=0, atol=1e-12)


def test_pairs_alternate_in_a_batch() -> None:
    pairs = pairs_of_documents(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 2, 3, 8]))
    assert pairs.chosen_N.tolist() == [1.0, 3.0] and pairs.rejected_N.tolist() == [2.0, 4.0]
    chosen_N, rejected_N = pairs.per_token()
    assert chosen_N.tolist() == [1.0, 1.0] and rejected_N.tolist() == [1.0, 0.5]


def test_a_margin_asks_for_a_wider_difference() -> None:
    chosen_N, rejected_N = torch.tensor([1.0]), torch.tensor([0.0])
    with_margin = bradley_terry_N(chosen_N, rejected_N, margin_N=torch.tensor([1.0]))
    assert float(with_margin) == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(bradley_terry_N(chosen_N, rejected_N), -functional.logsigmoid(torch.tensor([1.0])))

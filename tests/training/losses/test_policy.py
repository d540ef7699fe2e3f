"""A policy's log-probabilities, advantages, KL estimates and clipped losses equal TRL's, and do not depend on a split."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from orchestrator.alignment.credit_assignment import Baseline, advantages_PG
from orchestrator.dataloader.batch import Span
from orchestrator.losses.policy import Aggregation, KlEstimator, aggregate_sum, kl_BT, policy_token_losses_BT, weight
from orchestrator.losses.token_logprobs import sums_by_document, token_entropies_BT, token_logprobs_BT

TOLERANCE = 1e-5
SEQUENCES, POSITIONS, VOCABULARY = 6, 8, 11
LENGTHS_B = torch.tensor([8, 3, 1, 6, 8, 2])
MASK_BT = torch.arange(POSITIONS) < LENGTHS_B[:, None]
MAX_NEW_TOKENS = 12
CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.1, 0.4)]
TRL_LOSS_TYPES: dict[Aggregation, str] = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
SPLITS = [[6], [1] * 6, [2, 4], [3, 1, 2], [5, 1]]


def test_the_sweeps_have_every_kind() -> None:
    assert set(TRL_LOSS_TYPES) == set(get_args(Aggregation)) and len(TRL_LOSS_TYPES) == 3
    assert len(get_args(Baseline)) == 4 and len(get_args(KlEstimator)) == 3
    assert len(SPLITS) == 5 and all(sum(sizes) == SEQUENCES for sizes in SPLITS)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _policy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the policy, of the one that sampled and of the reference; advantages of both signs."""
    logprobs_BT = -_random(SEQUENCES, POSITIONS).abs() - 0.1
    old_BT = logprobs_BT + 0.3 * _random(SEQUENCES, POSITIONS, seed=1)
    reference_BT = logprobs_BT + 0.5 * _random(SEQUENCES, POSITIONS, seed=2)
    return logprobs_BT.requires_grad_(), old_BT, reference_BT, _random(SEQUENCES, seed=3)


# ---------------------------------------------------------------------------------------------- log-probabilities


def _logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    logits_BTV = 3 * _random(SEQUENCES, POSITIONS, VOCABULARY)
    labels_BT = torch.randint(VOCABULARY, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(1))
    labels_BT[torch.rand(SEQUENCES, POSITIONS, generator=torch.Generator().manual_seed(2)) < 0.4] = -100
    assert bool((labels_BT[:, 0] != -100).any()), "the first position must be labelled somewhere"
    return logits_BTV, labels_BT


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_trl_gives_the_same_logprobs_and_entropies(temperature: float) -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits_BTV, labels_BT = _logits_and_labels()
    logits_BTV.requires_grad_()
    ours_BT = token_logprobs_BT(logits_BTV, labels_BT, temperature=temperature)
    labelled_BT = labels_BT[:, 1:] != -100
    targets_BT = labels_BT[:, 1:].clamp(min=0)
    theirs_BT = selective_log_softmax(logits_BTV[:, :-1], targets_BT, temperature) * labelled_BT
    torch.testing.assert_close(ours_BT[:, 1:], theirs_BT, rtol=0, atol=TOLERANCE)
    weights_BT = _random(SEQUENCES, POSITIONS, seed=4)
    (ours,) = torch.autograd.grad((ours_BT * weights_BT).sum(), logits_BTV)
    (theirs,) = torch.autograd.grad((theirs_BT * weights_BT[:, 1:]).sum(), logits_BTV)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    entropies_BT = token_entropies_BT(logits_BTV, labels_BT, temperature=temperature)
    expected_BT = entropy_from_logits(logits_BTV.detach()[:, :-1] / temperature) * labelled_BT
    torch.testing.assert_close(entropies_BT[:, 1:], expected_BT, rtol=0, atol=TOLERANCE)
    assert not entropies_BT.requires_grad


def test_only_labelled_positions_have_a_value_or_a_gradient() -> None:
    logits_BTV, labels_BT = _logits_and_labels()
    logits_BTV.requires_grad_()
    before = labels_BT.clone()
    values_BT = token_logprobs_BT(logits_BTV, labels_BT)
    values_BT.sum().backward()
    assert torch.equal(labels_BT, before), "the labels are not written to"
    labelled_BT = labels_BT != -100
    labelled_BT[:, 0] = False
    assert torch.equal(values_BT != 0, labelled_BT)
    assert torch.equal(token_entropies_BT(logits_BTV, labels_BT) != 0, labelled_BT)
    assert logits_BTV.grad is not None
    assert torch.equal((logits_BTV.grad != 0).any(-1), labelled_BT.roll(-1, 1)), (
        "the logits before the token predict it"
    )


def test_logprobs_agree_with_finite_differences() -> None:
    logits_BTV, labels_BT = _logits_and_labels()
    one = logits_BTV[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: token_logprobs_BT(values, labels_BT[:2], temperature=0.8), one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs_of_any_logits_are_fp32(dtype: torch.dtype) -> None:
    logits_BTV, labels_BT = _logits_and_labels()
    logits_BTV = logits_BTV.to(dtype)
    values_BT = token_logprobs_BT(logits_BTV, labels_BT)
    assert values_BT.dtype == token_entropies_BT(logits_BTV, labels_BT).dtype == torch.float32
    exact_BT = token_logprobs_BT(logits_BTV.double(), labels_BT)
    torch.testing.assert_close(values_BT.double(), exact_BT, rtol=0, atol=TOLERANCE)


def test_a_batch_without_labels_has_a_gradient_of_zero() -> None:
    """Every rank goes through the backward pass, whatever its rows are."""
    logits_BTV = _random(1, 3, VOCABULARY).requires_grad_()
    labels_BT = torch.full((1, 3), -100)
    values_BT = token_logprobs_BT(logits_BTV, labels_BT)
    sums_D = sums_by_document(values_BT, ())
    sums_D.sum().backward()
    assert (
        sums_D.shape == (0,)
        and values_BT.shape == (1, 3)
        and logits_BTV.grad is not None
        and not bool(logits_BTV.grad.any())
    )
    assert token_entropies_BT(logits_BTV, labels_BT).shape == (1, 3)


def test_sums_by_document() -> None:
    values_BT = torch.arange(10.0, dtype=torch.float64).reshape(2, 5).requires_grad_()
    documents = (Span(0, 0, 3), Span(0, 3, 5), Span(1, 0, 4))
    sums_D = sums_by_document(values_BT, documents)
    assert sums_D.tolist() == [3.0, 7.0, 26.0]
    (gradient_BT,) = torch.autograd.grad((sums_D * torch.tensor([1.0, 2.0, 3.0])).sum(), values_BT)
    assert gradient_BT.tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 3, 0]]


# ----------------------------------------------------------------------------------------------------- advantages


class _Accelerator:
    """One process: what is gathered or reduced is what there is."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return value


def _trl_advantages_PG(rewards_PG: torch.Tensor, *, rloo: bool = False, scale: str = "group") -> torch.Tensor:
    """The advantages of TRL's own `_generate_and_score_completions`, whose model and rewards are given."""
    from trl import GRPOTrainer, RLOOTrainer

    rows, completions = rewards_PG.numel(), rewards_PG.shape[1]
    ids = [[1, 2]] * rows
    trainer = SimpleNamespace(
        accelerator=_Accelerator(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=rows,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        environment_factories=None,
        environments=None,
        tools=[],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        use_vllm=False,
        num_iterations=1,
        beta=0.0,
        _generate=lambda _: (ids, ids, ids) if rloo else (ids, ids, None, ids, None, {}, None, None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (torch.zeros(rows, 2), None, None),
        _calculate_rewards=lambda *_: rewards_PG.reshape(-1, 1),
        reward_weights=torch.ones(1),
        reward_clip_range=None,
        normalize_advantages=False,
        num_generations=completions,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_func_names=["reward"],
        log_multimodal=False,
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": {"reward": []}, "advantages": deque()},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer_class = RLOOTrainer if rloo else GRPOTrainer
    outputs = trainer_class._generate_and_score_completions(trainer, [{"prompt": "p"}] * rows)
    return outputs["advantages"].reshape(rewards_PG.shape)


@pytest.mark.parametrize(("prompts", "completions"), [(1, 2), (3, 4), (2, 16)])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_trl_gives_the_same_advantages(kind: Baseline, prompts: int, completions: int) -> None:
    rewards_PG = 2 * _random(prompts, completions) + 5
    theirs_PG = _trl_advantages_PG(rewards_PG, rloo=kind == "rloo", scale="group" if kind == "grpo" else "none")
    torch.testing.assert_close(advantages_PG(rewards_PG, kind=kind), theirs_PG, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("completions", [2, 3, 8])
def test_rloo_compares_with_the_mean_of_the_others(completions: int) -> None:
    rewards_PG = _random(4, completions)
    ours_PG = advantages_PG(rewards_PG, kind="rloo")
    for prompt, completion in itertools.product(range(4), range(completions)):
        others = [float(rewards_PG[prompt, other]) for other in range(completions) if other != completion]
        expected = float(rewards_PG[prompt, completion]) - sum(others) / len(others)
        assert float(ours_PG[prompt, completion]) == pytest.approx(expected, abs=1e-12)
    scaled_PG = completions / (completions - 1) * advantages_PG(rewards_PG, kind="dr_grpo")
    torch.testing.assert_close(ours_PG, scaled_PG, rtol=0, atol=1e-12)


def test_reinforce_compares_with_the_mean_of_the_batch() -> None:
    """TRL has no such baseline: the formula itself, with completions counted one by one."""
    rewards_PG = torch.tensor([[1.0, 2.0], [3.0, 10.0]])
    assert advantages_PG(rewards_PG, kind="reinforce").tolist() == [[-3.0, -2.0], [-1.0, 6.0]]
    assert advantages_PG(torch.tensor([[1.0], [3.0]]), kind="reinforce").tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_teach_nothing_and_one_completion_has_no_group(kind: Baseline) -> None:
    assert not bool(advantages_PG(torch.full((2, 4), 0.5), kind=kind).any())
    with pytest.raises(AssertionError, match="compares completions"):
        advantages_PG(torch.ones(4, 1), kind=kind)


# ------------------------------------------------------------------------------------------------------------- KL


def test_k3_is_never_negative() -> None:
    steps = torch.cat([-torch.logspace(-9, 2, 400), torch.zeros(1), torch.logspace(-9, 1.5, 400)]).unsqueeze(0)
    for ratios_BT in (steps, steps.double()):
        estimates_BT = kl_BT(torch.zeros_like(ratios_BT), ratios_BT, kind="k3")
        assert bool((estimates_BT >= 0).all()) and bool(estimates_BT.isfinite().all()) and estimates_BT.numel() == 801


def _expected(logits_V: torch.Tensor, reference_V: torch.Tensor, kind: KlEstimator) -> torch.Tensor:
    """The estimator's mean over the vocabulary, each token weighed by its probability; the weights carry no gradient."""
    logprobs_V = logits_V.log_softmax(-1)
    estimates_V = kl_BT(logprobs_V[None], reference_V[None], kind=kind)[0]
    return (logprobs_V.detach().exp() * estimates_V).sum()


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_have_the_kl_as_their_expectation(seed: int) -> None:
    logits_V = _random(VOCABULARY, seed=seed)
    reference_V = _random(VOCABULARY, seed=seed + 100).log_softmax(-1)
    logprobs_V = logits_V.log_softmax(-1)
    kl = float((logprobs_V.exp() * (logprobs_V - reference_V)).sum())
    assert kl > 0.1
    assert float(_expected(logits_V, reference_V, "k1")) == pytest.approx(kl, abs=1e-12)
    assert float(_expected(logits_V, reference_V, "k3")) == pytest.approx(kl, abs=1e-12)
    assert abs(float(_expected(logits_V, reference_V, "k2")) - kl) > 1e-3, "k2 is biased"


def test_the_gradients_of_kl_estimates_used_as_losses() -> None:
    """On tokens that the policy samples, k2's expected gradient is that of the KL; k1's is 0, as its docstring says."""
    logits_V = _random(VOCABULARY).requires_grad_()
    reference_V = _random(VOCABULARY, seed=100).log_softmax(-1)
    logprobs_V = logits_V.log_softmax(-1)
    (exact_V,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - reference_V)).sum(), logits_V)
    gradients = {
        kind: torch.autograd.grad(_expected(logits_V, reference_V, kind), logits_V)[0] for kind in get_args(KlEstimator)
    }
    torch.testing.assert_close(gradients["k2"], exact_V, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(exact_V), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(KlEstimator))
def test_kl_estimates_agree_with_finite_differences(kind: KlEstimator) -> None:
    logprobs_BT, _, reference_BT, _ = _policy()
    assert torch.autograd.gradcheck(lambda values: kl_BT(values, reference_BT, kind=kind), logprobs_BT)


# ---------------------------------------------------------------------------------------------------- policy loss


def _trl_loss(
    logprobs_BT: torch.Tensor,
    inputs: dict[str, Any],
    *,
    loss_type: str,
    clip: tuple[float, float],
    beta: float,
    parts: int,
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """GRPOTrainer._compute_loss itself, on one of `parts` micro-batches that are accumulated."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        accelerator=_Accelerator(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=parts),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type=loss_type,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        beta=beta,
        use_vllm=False,
        current_gradient_accumulation_steps=parts,
        max_completion_length=MAX_NEW_TOKENS,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_BT, torch.zeros_like(logprobs_BT), None),
        _metrics={"train": defaultdict(list)},
    )
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def _trl_inputs(rows: slice) -> dict[str, Any]:
    _, old_BT, reference_BT, advantages_B = _policy()
    ids_BT = torch.ones(MASK_BT[rows].shape, dtype=torch.long)
    return {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": ids_BT[:, :1],
        "completion_ids": ids_BT,
        "completion_mask": MASK_BT[rows].long(),
        "advantages": advantages_B[rows],
        "old_per_token_logps": old_BT[rows],
        "ref_per_token_logps": reference_BT[rows],
        "num_items_in_batch": MASK_BT.sum(),
    }


def _our_loss(
    logprobs_BT: torch.Tensor, sizes: list[int], *, kind: Aggregation, clip: tuple[float, float], beta: float
) -> torch.Tensor:
    """The loss of the global batch, from micro-batches of these sizes."""
    _, old_BT, reference_BT, advantages_B = _policy()
    columns = (logprobs_BT, old_BT, reference_BT, advantages_B, MASK_BT)
    total = torch.zeros((), dtype=torch.float64)
    for logprobs, old, reference, advantages, mask in zip(*(column.split(sizes) for column in columns), strict=True):
        losses, _ = policy_token_losses_BT(logprobs, old, advantages, clip_low=clip[0], clip_high=clip[1])
        losses = losses + beta * kl_BT(logprobs, reference, kind="k3")
        total = total + aggregate_sum(losses, mask, kind=kind, max_new_tokens=MAX_NEW_TOKENS)
    return total / weight(kind, num_tokens=int(MASK_BT.sum()), num_sequences=SEQUENCES)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", TRL_LOSS_TYPES)
def test_trl_computes_the_same_loss(kind: Aggregation, clip: tuple[float, float], beta: float, parts: int) -> None:
    """TRL weighs micro-batches alike, so they are of one size here; ours may be of any (the next test)."""
    logprobs_BT, *_ = _policy()
    size = SEQUENCES // parts
    slices = [slice(start, start + size) for start in range(0, SEQUENCES, size)]
    theirs = [
        _trl_loss(
            logprobs_BT[rows], _trl_inputs(rows), loss_type=TRL_LOSS_TYPES[kind], clip=clip, beta=beta, parts=parts
        )[0]
        for rows in slices
    ]
    ours = _our_loss(logprobs_BT, [size] * parts, kind=kind, clip=clip, beta=beta)
    torch.testing.assert_close(ours, torch.stack(theirs).sum(), rtol=0, atol=TOLERANCE)
    (our_gradient,) = torch.autograd.grad(ours, logprobs_BT)
    (their_gradient,) = torch.autograd.grad(torch.stack(theirs).sum(), logprobs_BT)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("kind", TRL_LOSS_TYPES)
def test_the_gradient_does_not_depend_on_the_split(kind: Aggregation, sizes: list[int]) -> None:
    logprobs_BT, *_ = _policy()
    losses = [_our_loss(logprobs_BT, part, kind=kind, clip=(0.2, 0.28), beta=0.04) for part in ([SEQUENCES], sizes)]
    whole, split = (torch.autograd.grad(loss, logprobs_BT)[0] for loss in losses)
    assert bool(whole.any())
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
def test_trl_counts_the_same_clipped_tokens(clip: tuple[float, float]) -> None:
    logprobs_BT, old_BT, _, advantages_B = _policy()
    losses_BT, clipped_BT = policy_token_losses_BT(
        logprobs_BT, old_BT, advantages_B, clip_low=clip[0], clip_high=clip[1]
    )
    _, metrics = _trl_loss(logprobs_BT, _trl_inputs(slice(None)), loss_type="dapo", clip=clip, beta=0.0, parts=1)
    share = float(clipped_BT[MASK_BT].double().mean())
    assert 0.1 < share < 0.9
    assert metrics["clip_ratio/region_mean"] == [pytest.approx(share, abs=TOLERANCE)]
    (gradient_BT,) = torch.autograd.grad(losses_BT.sum(), logprobs_BT)
    assert torch.equal(gradient_BT == 0, clipped_BT), "a token has no gradient where it is clipped, and only there"


@pytest.mark.parametrize("clip", CLIPS)
def test_clipped_losses_agree_with_finite_differences(clip: tuple[float, float]) -> None:
    logprobs_BT, old_BT, _, advantages_B = _policy()
    advantages_B.requires_grad_()

    def losses(logprobs_BT: torch.Tensor, advantages_B: torch.Tensor) -> torch.Tensor:
        return policy_token_losses_BT(logprobs_BT, old_BT, advantages_B, clip_low=clip[0], clip_high=clip[1])[0]

    assert torch.autograd.gradcheck(losses, (logprobs_BT, advantages_B))


@pytest.mark.parametrize("kind", TRL_LOSS_TYPES)
def test_aggregates_agree_with_finite_differences(kind: Aggregation) -> None:
    losses_BT = _random(SEQUENCES, POSITIONS).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: aggregate_sum(values, MASK_BT, kind=kind, max_new_tokens=MAX_NEW_TOKENS), losses_BT
    )


def test_a_ratio_of_one_gives_minus_the_advantage() -> None:
    logprobs_BT, *_, advantages_B = _policy()
    losses_BT, clipped_BT = policy_token_losses_BT(
        logprobs_BT, logprobs_BT.detach(), advantages_B, clip_low=0.2, clip_high=0.2
    )
    torch.testing.assert_close(losses_BT, -advantages_B[:, None].expand(-1, POSITIONS), rtol=0, atol=0)
    assert not bool(clipped_BT.any())
    (gradient_BT,) = torch.autograd.grad(losses_BT.sum(), logprobs_BT)
    torch.testing.assert_close(gradient_BT, losses_BT.detach(), rtol=0, atol=1e-12)


def test_masked_tokens_and_empty_sequences_add_nothing() -> None:
    losses_BT = torch.tensor([[1.0, 3.0, float("nan")], [float("inf")] * 3])
    mask_BT = torch.tensor([[True, True, False], [False] * 3])
    sums = {
        kind: float(aggregate_sum(losses_BT, mask_BT, kind=kind, max_new_tokens=8)) for kind in get_args(Aggregation)
    }
    assert sums == {"token": 4.0, "sequence": 2.0, "constant": 0.5}
    assert [weight(kind, num_tokens=5, num_sequences=2) for kind in get_args(Aggregation)] == [5, 2, 2]

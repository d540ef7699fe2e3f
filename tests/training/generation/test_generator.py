"""Completions do not depend on the batch or the ranks, follow the distribution that they should, and end."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_model
import torch

from orchestrator.composition.compose import compose
from orchestrator.config.rollout import RolloutConfig
from orchestrator.distributed.runtime import Runtime, start_single_runtime
from orchestrator.generation.generator import Completion, Request, SeededSampler, end_ids_of, make_generate, seed_of
from orchestrator.generation.seeded_sampling import SeededDraws
from orchestrator.models.loading import load_model

SETTINGS = RolloutConfig(
    prompts=4,
    group_size=2,
    passes=1,
    max_new_tokens=12,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    generate_size=4,
    engine="batch",
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("policy") / "model"
    tiny_model.write_llama(folder)
    config = compose(["+experiment=llama_rlhf", f"model.base={folder}", "model.dtype=float32"])
    runtime = start_single_runtime(config, autocast=False)
    return runtime, load_model(folder, config, weights_dtype=torch.float32), folder


def requests(count: int) -> list[Request]:
    return [Request(prompt=tuple(range(5, 8 + 3 * i)), seed=seed_of(0, i)) for i in range(count)]


def generated(
    policy: tuple[Runtime, torch.nn.Module, Path], asked: list[Request], **changes: object
) -> list[Completion]:
    runtime, model, folder = policy
    generate = make_generate(runtime, model, end_ids=end_ids_of(model, folder), pad_id=0)
    return generate(asked, SETTINGS.model_copy(update=changes))


def test_a_completion_depends_on_its_prompt_and_seed_alone(policy: tuple[Runtime, torch.nn.Module, Path]) -> None:
    asked = requests(6)
    together = generated(policy, asked, generate_size=6)
    assert [one.ids for one in generated(policy, asked, generate_size=1)] == [one.ids for one in together]
    assert [one.ids for one in generated(policy, asked[::-1])] == [one.ids for one in together][::-1]
    other = generated(policy, [Request(prompt=one.prompt, seed=one.seed + 1) for one in asked])
    assert sum(a.ids != b.ids for a, b in zip(together, other, strict=True)) == 6
    assert all(len(one.ids) == len(one.logprobs) <= 12 for one in together)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_continuous_batching_answers_as_a_batch_does(
    policy: tuple[Runtime, torch.nn.Module, Path], temperature: float
) -> None:
    """Fewer places than requests, unequal prompts, answers that end early."""
    runtime, model, _ = policy
    asked = requests(7)
    probe = generated(policy, asked, temperature=temperature)
    ends = [probe[0].ids[1], probe[3].ids[2]]
    generate = make_generate(runtime, model, end_ids=ends, pad_id=0)
    settings = SETTINGS.model_copy(update={"temperature": temperature, "generate_size": 3})
    batch = generate(asked, settings)
    continuous = generate(asked, settings.model_copy(update={"engine": "continuous"}))
    assert len({len(one.ids) for one in batch}) > 1
    assert [one.ids for one in continuous] == [one.ids for one in batch]
    assert [one.is_finished for one in continuous] == [one.is_finished for one in batch]
    for one, other in zip(continuous, batch, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_greedy_is_transformers_own_greedy(policy: tuple[Runtime, torch.nn.Module, Path]) -> None:
    _, model, folder = policy
    (ours,) = generated(policy, requests(1), temperature=0.0)
    ids = torch.tensor([requests(1)[0].prompt])
    ends = end_ids_of(model, folder)
    theirs = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=ends,
        pad_token_id=0,
    )
    assert list(ours.ids) == theirs[0, ids.shape[1] :].tolist()[: len(ours.ids)]
    with torch.no_grad():
        logits = model(torch.tensor([[*requests(1)[0].prompt, *ours.ids]])).logits.log_softmax(-1)
    start = ids.shape[1] - 1
    expected = [float(logits[0, start + i, token]) for i, token in enumerate(ours.ids)]
    assert ours.logprobs == pytest.approx(expected, abs=1e-4)


def test_an_end_token_ends_a_completion(policy: tuple[Runtime, torch.nn.Module, Path]) -> None:
    runtime, model, _ = policy
    first = generated(policy, requests(1), temperature=0.0)[0].ids
    generate = make_generate(runtime, model, end_ids=[first[2]], pad_id=0)
    (ended,) = generate(requests(1), SETTINGS.model_copy(update={"temperature": 0.0}))
    assert ended.is_finished and ended.ids == first[: first.index(first[2]) + 1]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 2)])
def test_draws_follow_the_softmax(temperature: float, top_k: int) -> None:
    draws = 4000
    settings = SETTINGS.model_copy(update={"temperature": temperature, "top_k": top_k})
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = SeededSampler(SeededDraws([seed_of(7, i) for i in range(draws)], settings))
    only_BV = sampler(torch.zeros(draws, 1, dtype=torch.long), logits_V.expand(draws, 4))  # type: ignore[arg-type]
    shares_V = torch.bincount(only_BV.argmax(-1), minlength=4) / draws
    expected_V = (logits_V / temperature).softmax(-1)
    assert sampler.logprobs[0][0] == pytest.approx(float(expected_V.log()[only_BV[0].argmax()]), abs=1e-5)
    if top_k:
        expected_V = torch.where(expected_V >= expected_V.topk(top_k).values[-1], expected_V, 0.0)
        expected_V = expected_V / expected_V.sum()
    assert torch.allclose(shares_V, expected_V, atol=0.03)

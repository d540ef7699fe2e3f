"""The loss head equals whole logits in loss, log-probabilities, entropies and gradients, and never makes whole logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loss_head import VOCABULARY, WIDTHS, gradients_of, make_inputs, make_model, make_query, tuned_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaForCausalLM,
)

from orchestrator.architecture.loss_head_chunks import LEAST_ROWS, chunk_rows
from orchestrator.losses.chunked_head import Shape, Term, chunked_logprobs_K
from orchestrator.losses.token_logprobs import labelled_positions, token_entropies_BT, token_logprobs_BT
from orchestrator.models.causal_lm import _known_head, attach_head, head_of
from orchestrator.models.tuning import keep_input_types

TOLERANCE = 1e-6
CPU = torch.device("cpu")


def _assert_near(one: torch.Tensor, other: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert one.shape == other.shape
    assert float((one - other).detach().norm()) <= tolerance * max(1.0, float(other.detach().norm()))


CASES = [
    *[(kind, tuning) for kind in ("tied", "untied", "softcap", "bias") for tuning in ("full", "lora")],
    ("gpt2", "lora"),
    *[("untied", tuning) for tuning in ("lora-head", "saved-head", "dora-head")],
    ("softcap", "lora-head"),
]


@pytest.mark.parametrize(("kind", "tuning"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_equals_whole_logits(kind: str, tuning: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.architecture.loss_head_chunks.CPU_CHUNK_BYTES", 4 * VOCABULARY)
    monkeypatch.setattr(
        "orchestrator.architecture.loss_head_chunks.CPU_BLOCK_BYTES", 4 * VOCABULARY
    )  # 8 rows of 32 at a time
    model = tuned_model(make_model(kind), tuning)
    assert head_of(model, CPU).startswith("chunked") == (tuning != "dora-head")
    ids_BT, labels_BT = make_inputs()
    assert len(labelled_positions(labels_BT)) % LEAST_ROWS and len(labelled_positions(labels_BT)) > 2 * LEAST_ROWS
    ours_BT, entropies_BT = model(
        input_ids=ids_BT, query=make_query(labels_BT, temperature=temperature, entropies=True)
    )
    logits_BTV = model(input_ids=ids_BT).logits
    plain_BT = token_logprobs_BT(logits_BTV, labels_BT, temperature=temperature)
    _assert_near(ours_BT, plain_BT)
    _assert_near(entropies_BT, token_entropies_BT(logits_BTV, labels_BT, temperature=temperature))
    assert not entropies_BT.requires_grad
    weights_BT = torch.randn(ours_BT.shape, generator=torch.Generator().manual_seed(1))
    plain = gradients_of(model, (plain_BT * weights_BT).sum())
    ours = gradients_of(model, (ours_BT * weights_BT).sum())
    assert ours.keys() == plain.keys() and len(ours) >= 2
    for name, gradient in ours.items():
        _assert_near(gradient, plain[name], 2e-6)
    query = make_query(labels_BT, temperature=temperature, is_summed=True)
    summed = gradients_of(model, -0.3 * model(input_ids=ids_BT, query=query)[0].sum())
    whole = token_logprobs_BT(model(input_ids=ids_BT).logits, labels_BT, temperature=temperature)
    plain = gradients_of(model, -0.3 * whole.sum())
    assert summed.keys() == plain.keys()
    for name, gradient in summed.items():
        _assert_near(gradient, plain[name], 2e-6)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("autocast", "is_summed"), [(True, True), (True, False), (False, True), (False, False)])
def test_in_bfloat16_it_is_as_near_to_fp32_as_whole_logits_are(tuning: str, autocast: bool, is_summed: bool) -> None:
    model = tuned_model(make_model("tied"), tuning)
    ids_BT, labels_BT = make_inputs()
    exact_BT = token_logprobs_BT(model(input_ids=ids_BT).logits, labels_BT)
    exact = gradients_of(model, exact_BT.sum())
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours_BT, _ = model(input_ids=ids_BT, query=make_query(labels_BT, is_summed=is_summed))
        logits_BTV = model(input_ids=ids_BT).logits
    plain_BT = token_logprobs_BT(logits_BTV, labels_BT)
    assert ours_BT.dtype == torch.float32
    assert (ours_BT - exact_BT).norm() <= 1.1 * (plain_BT - exact_BT).norm() + 1e-6
    plain, ours = gradients_of(model, plain_BT.sum()), gradients_of(model, ours_BT.sum())
    assert ours.keys() == plain.keys() == exact.keys()

    def error(found: dict[str, torch.Tensor]) -> float:
        return float(sum((found[name] - exact[name]).square().sum() for name in exact) ** 0.5)

    assert error(ours) <= 1.2 * error(plain)


def test_lora_layers_that_take_inputs_as_they_are_compute_the_same() -> None:
    """PEFT's detour of every 16-bit input through fp32 changes no bit of losses and gradients under autocast."""
    model = tuned_model(make_model("untied").to(torch.bfloat16), "lora")
    ids_BT, labels_BT = make_inputs()
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for prepare in (lambda _: None, keep_input_types):
        prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            logprobs_BT, _ = model(input_ids=ids_BT, query=make_query(labels_BT))
        found.append((logprobs_BT, gradients_of(model, logprobs_BT.sum())))
    (one_BT, ones), (other_BT, others) = found
    assert torch.equal(one_BT, other_BT) and ones.keys() == others.keys() and len(ones) == 8
    assert all(one.dtype == torch.float32 and torch.equal(one, others[name]) for name, one in ones.items())


def test_a_micro_batch_without_a_trained_token_is_part_of_the_graph() -> None:
    ids_BT, labels_BT = make_inputs()
    for tuning in ("full", "lora", "lora-head"):
        model = tuned_model(make_model("untied"), tuning)
        logprobs_BT, entropies_BT = model(
            input_ids=ids_BT,
            query=make_query(torch.full_like(labels_BT, -100), entropies=True, is_summed=tuning == "full"),
        )
        assert logprobs_BT.shape == entropies_BT.shape == ids_BT.shape and not bool(logprobs_BT.any())
        gradients = gradients_of(model, logprobs_BT.sum())
        trained = [name for name, one in model.named_parameters() if one.requires_grad]
        assert gradients.keys() == set(trained) and not any(bool(one.any()) for one in gradients.values())


def test_untrained_positions_have_no_gradient_of_their_own() -> None:
    """What stands after the last label does not change anything."""
    model = tuned_model(make_model("untied"), "full")
    ids_BT, labels_BT = make_inputs()
    labels_BT[:, 20:] = -100
    other_BT = torch.cat([ids_BT[:, :20], ids_BT[:, 20:].flip(1)], dim=1)
    one_BT, _ = model(input_ids=ids_BT, query=make_query(labels_BT))
    two_BT, _ = model(input_ids=other_BT, query=make_query(labels_BT))
    assert torch.equal(one_BT, two_BT)


class _Largest(TorchDispatchMode):
    """Records the most elements of any tensor whose last width is the vocabulary's."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[-1] == VOCABULARY:
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("tuning", ["full", "lora", "lora-head"])
def test_no_tensor_holds_whole_logits(tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.architecture.loss_head_chunks.CPU_CHUNK_BYTES", 4 * VOCABULARY)
    model = tuned_model(make_model("untied"), tuning)
    ids_BT, labels_BT = make_inputs()
    trained = len(labelled_positions(labels_BT))
    for is_summed in (False, True):
        with _Largest() as ours:
            model(input_ids=ids_BT, query=make_query(labels_BT, is_summed=is_summed))[0].sum().backward()
        assert 0 < ours.elements <= LEAST_ROWS * VOCABULARY < trained * VOCABULARY
    with _Largest() as plain:
        token_logprobs_BT(model(input_ids=ids_BT).logits, labels_BT).sum().backward()
    assert plain.elements >= ids_BT.numel() * VOCABULARY


def test_a_forward_pass_of_a_summed_head_counts_the_logits_once() -> None:
    """Its backward pass makes no product with the vocabulary: all are made in the forward pass."""
    model = tuned_model(make_model("untied"), "full")
    ids_BT, labels_BT = make_inputs()
    for is_summed, most in ((True, 0), (False, 1)):
        loss = model(input_ids=ids_BT, query=make_query(labels_BT, is_summed=is_summed))[0].sum()
        with _Largest() as backward:
            loss.backward()
        assert (backward.elements > 0) == bool(most), is_summed


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith(("aten::mm", "aten::addmm"))
        return func(*args, **(kwargs or {}))


def test_scoring_alone_makes_no_gradient_of_a_trained_head() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_KW = torch.randn(70, 5, generator=generator)
    weight_VW = torch.randn(11, 5, generator=generator, requires_grad=True)
    targets_K = torch.randint(11, (70,), generator=generator)
    found = {}
    for is_graded in (False, True):
        with torch.set_grad_enabled(is_graded), _Products() as products:
            term = Term(hidden_KW=hidden_KW, weight_VW=weight_VW)
            found[is_graded], _ = chunked_logprobs_K([term], None, targets_K, Shape(rows=32, is_summed=True))
        assert products.count == 3 * (1 + is_graded), "three chunks, and a sum over tokens for each"
    assert torch.equal(found[False], found[True]) and not found[False].requires_grad


def test_the_kernel_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_KW, weight_VW, low_KR, up_VR = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 5), (11, 5), (7, 2), (11, 2))
    )
    bias_V = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets_K = torch.randint(11, (7,), generator=generator)
    shape = Shape(softcap=2.0, temperature=0.8, rows=3)

    def score(*tensors: torch.Tensor) -> torch.Tensor:
        hidden, weight, low, up, bias = tensors
        terms = [Term(hidden_KW=hidden, weight_VW=weight), Term(hidden_KW=low, weight_VW=up)]
        return chunked_logprobs_K(terms, bias, targets_K, shape)[0]

    assert torch.autograd.gradcheck(score, (hidden_KW, weight_VW, low_KR, up_VR, bias_V))
    frozen = (weight_VW.detach(), up_VR.detach(), bias_V.detach())
    assert torch.autograd.gradcheck(
        lambda hidden, low: score(hidden, frozen[0], low, frozen[1], frozen[2]), (hidden_KW, low_KR)
    )


def test_a_model_that_scales_its_logits_makes_its_own() -> None:
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**WIDTHS, logit_scale=0.0625))
    attach_head(model)
    assert head_of(model, CPU).startswith("whole logits: those of a small copy of CohereForCausalLM")
    ids_BT, labels_BT = make_inputs()
    ours_BT, entropies_BT = model(input_ids=ids_BT, query=make_query(labels_BT, temperature=0.7, entropies=True))
    logits_BTV = model(input_ids=ids_BT).logits
    _assert_near(ours_BT, token_logprobs_BT(logits_BTV, labels_BT, temperature=0.7))
    _assert_near(entropies_BT, token_entropies_BT(logits_BTV, labels_BT, temperature=0.7))


def test_the_head_in_words_and_the_rows_of_a_chunk() -> None:
    for tuning, words in {
        "full": "chunked cross-entropy in plain torch (cpu), on trained tokens only",
        "lora-head": "chunked cross-entropy",
        "saved-head": "chunked cross-entropy",
        "dora-head": "logits of the trained tokens: the head is a Linear",
    }.items():
        assert words in head_of(tuned_model(make_model("untied"), tuning), CPU), tuning
    assert (
        chunk_rows(128_256, "cpu") == 98
        and chunk_rows(10**7, "cpu") == LEAST_ROWS
        and chunk_rows(10**7, "cpu", trained_width=4096) == 1024
    )


def test_the_model_is_still_the_one_that_transformers_made(tmp_path: Any) -> None:
    """It generates, is saved, loaded and copied as before, and attaching again changes nothing."""
    model = tuned_model(make_model("tied"), "full")
    kind = type(model)
    model.config._attn_implementation_internal = (
        "flash_attention_2"  # no kernel of the model's own is needed to know it
    )
    assert _known_head(model)
    model.config._attn_implementation_internal = "sdpa"
    attach_head(model)
    assert type(model) is kind and isinstance(model, LlamaForCausalLM)
    ids_BT, labels_BT = make_inputs()
    fresh = make_model("tied")
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids_BT[:, :7], **greedy), fresh.generate(ids_BT[:, :7], **greedy))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(again(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)
    copied_BT, _ = copy.deepcopy(model)(input_ids=ids_BT, query=make_query(labels_BT))
    assert torch.equal(copied_BT, model(input_ids=ids_BT, query=make_query(labels_BT))[0])

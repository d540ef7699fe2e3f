"""Causal models that score requested tokens: the chunked loss head inside their own forward pass.

Inside, because DDP's and DeepSpeed's hooks run there: under ZeRO-3 calling the head's module gathers its weight,
in the forward and in the backward pass. B rows of T positions, K labelled tokens, W hidden size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.architecture.kernels import (
    NO_HEAD,
    HeadChoice,
    HeadKernel,
    head_kernel,
    head_words,
    liger_is_installed,
)
from orchestrator.losses import liger_head as liger
from orchestrator.losses.chunked_head import Shape, Term, chunked_logprobs_K
from orchestrator.losses.token_logprobs import TokenSpan, token_entropies_BT, token_logprobs_BT
from orchestrator.models.small_copy import narrowed

NOT_FOR_A_BACKBONE = ("labels", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep")
PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """Which tokens a model scores, instead of returning logits; passed as `query=`."""

    labels_BT: torch.Tensor
    """-100 where nothing is scored; the first position is never scored."""
    positions_K: torch.Tensor
    """Positions of the labelled tokens in the flattened labels, from `token_logprobs.labelled_positions`."""
    temperature: float = 1.0
    entropies: bool = False
    is_summed: bool = False
    """The caller promises to only sum the log-probabilities and multiply the sum."""
    prompts: Sequence[TokenSpan] | None = None
    """Each document's tokens before its first trained one, for models that treat them separately; None: derive them."""


def attach_head(model: Any, *, choice: HeadChoice = "auto") -> None:
    """Make a causal model answer a `Query` with (logprobs_BT, entropies_BT or None), fp32; other calls are unchanged.

    `choice` is `model.loss_head`.
    A second call has no effect. If a small copy of the model shows that its logits are not just its head's products, it
    keeps computing its own logits, and the tokens are scored afterwards: `head_of` returns which.
    """
    if hasattr(model, "loss_head"):
        return
    model.__class__ = _scoring_class(type(model), _known_head(model), choice)
    head = model.get_output_embeddings()
    # Another class, not a wrapper: names of weights, hooks and ZeRO's partitions stay as they are.
    if type(head) is nn.Linear:
        head.__class__ = _chunking_class(nn.Linear)


def attach_adapted_head(model: Any) -> None:
    """The same for a head with a PEFT adapter; call it after PEFT."""
    from peft.tuners.lora.layer import Linear

    head = model.get_output_embeddings()
    if type(head) is Linear and not head.lora_variant:
        head.__class__ = _chunking_class(Linear)


def head_of(model: Any, device: torch.device, *, is_summed: bool = True) -> str:
    """Description of how the unwrapped model scores tokens on a device; `is_summed` as in `Query`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = getattr(base, "loss_head", None)
    if known is None:
        return NO_HEAD
    if not known:
        return f"whole logits: those of a small copy of {type(base).__name__} are not just its head's products"
    if not hasattr(base.get_output_embeddings(), "products"):
        return f"logits of the trained tokens: the head is a {type(base.get_output_embeddings()).__name__}"
    is_plain = base.get_output_embeddings().products.__func__ is _plain_products
    return head_words(_kernel_of(base, device) if is_summed and is_plain else "torch", device.type)


def _kernel_of(model: Any, device: torch.device) -> HeadKernel:
    """The kernel that scores sums on this device; the torch kernel handles whatever it does not support."""
    return head_kernel(model.head_choice, device.type, has_liger=liger_is_installed())


def _scoring_class(original: type, known: bool, choice: HeadChoice) -> type:
    """A class of the same name, since config.json will contain it."""

    @functools.wraps(original.forward)  # generate() reads the signature
    def forward(self: Any, *arguments: Any, query: Query | None = None, **inputs: Any) -> Any:
        if query is None:
            return original.forward(self, *arguments, **inputs)
        assert not arguments, "tokens are scored by keywords alone"
        if known:
            return _scores_BT(self, query, inputs)
        logits_BTV = _of_real_tokens(original.forward(self, **inputs).logits, query)
        logprobs_BT = token_logprobs_BT(logits_BTV, query.labels_BT, temperature=query.temperature)
        if not query.entropies:
            return logprobs_BT, None
        return logprobs_BT, token_entropies_BT(logits_BTV, query.labels_BT, temperature=query.temperature)

    added = {"forward": forward, "loss_head": known, "head_choice": choice, "__module__": original.__module__}
    return type(original.__name__, (original,), added)


def _scores_BT(model: Any, query: Query, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    known = {name: value for name, value in inputs.items() if value is not None and name not in NOT_FOR_A_BACKBONE}
    hidden_BTW = getattr(model, model.base_model_prefix)(**known).last_hidden_state
    hidden_BTW = _of_real_tokens(hidden_BTW, query)
    # The hidden state at t - 1 predicts token t. Only these rows reach the head.
    before_KW = hidden_BTW.flatten(0, 1).index_select(0, query.positions_K - 1)
    targets_K = query.labels_BT.flatten().index_select(0, query.positions_K)
    shape = Shape(
        softcap=_softcap(model),
        temperature=query.temperature,
        entropies=query.entropies,
        is_summed=query.is_summed,
        kernel=_kernel_of(model, hidden_BTW.device),
    )
    head = model.get_output_embeddings()
    if hasattr(head, "products"):
        logprobs_K, entropies_K = head(before_KW, targets_K=targets_K, shape=shape)
    else:
        logprobs_K, entropies_K = _logprobs_of_logits(head(before_KW), targets_K, shape)
    return _placed(logprobs_K, query), None if entropies_K is None else _placed(entropies_K, query)


def _of_real_tokens(values_BTX: torch.Tensor, query: Query) -> torch.Tensor:
    """Drop the virtual tokens that prompt tuning puts before every row."""
    return values_BTX[:, values_BTX.shape[1] - query.labels_BT.shape[1] :]


def _placed(values_K: torch.Tensor, query: Query) -> torch.Tensor:
    flat = values_K.new_zeros(query.labels_BT.numel())
    return flat.index_copy(0, query.positions_K, values_K).view(query.labels_BT.shape)


def _logprobs_of_logits(
    logits_KV: torch.Tensor, targets_K: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities for a head that is not a plain matrix (4 bits, DoRA)."""
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    if shape.softcap is not None:
        logits_KV = shape.softcap * torch.tanh(logits_KV / shape.softcap)
    logprobs_KV = (logits_KV / shape.temperature).log_softmax(1)
    entropies_K = -(logprobs_KV.detach().exp() * logprobs_KV.detach()).sum(1) if shape.entropies else None
    return logprobs_KV.gather(1, targets_K.unsqueeze(1)).squeeze(1), entropies_K


def _chunking_class(original: type) -> type:
    """A linear layer that, given targets, returns the result of `chunked_logprobs_K` instead of products."""

    def forward(self: Any, hidden_KW: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if "targets_K" not in options:
            return original.forward(self, hidden_KW, *arguments, **options)
        layer = self.base_layer if original is not nn.Linear else self
        hidden_KW = hidden_KW.to(_compute_type(hidden_KW, layer.weight))
        return _logprobs_K(self.products(hidden_KW), layer.bias, **options)

    products = _plain_products if original is nn.Linear else _adapted_products
    return type(
        original.__name__, (original,), {"forward": forward, "products": products, "__module__": original.__module__}
    )


def _logprobs_K(
    terms: Sequence[Term], bias_V: torch.Tensor | None, *, targets_K: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result of `chunked_logprobs_K`, computed by Liger if it supports the request."""
    if liger.takes(terms, targets_K, shape):
        return liger.summed_logprobs_K(terms[0], bias_V, targets_K, shape.softcap), None
    return chunked_logprobs_K(terms, bias_V, targets_K, shape)


def _compute_type(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _plain_products(self: Any, hidden_KW: torch.Tensor) -> list[Term]:
    return [Term(hidden_KW=hidden_KW, weight_VW=self.weight)]


def _adapted_products(self: Any, hidden_KW: torch.Tensor) -> list[Term]:
    """The frozen head, and scaling x B A of every active adapter."""
    terms = [Term(hidden_KW=hidden_KW, weight_VW=self.base_layer.weight)]
    if self.disable_adapters or self.merged:
        return terms
    for name in self.active_adapters:
        if name in self.lora_A:
            low_KR = self.lora_A[name](self.lora_dropout[name](hidden_KW.to(self.lora_A[name].weight.dtype)))
            low_KR = (low_KR * self.scaling[name]).to(hidden_KW.dtype)
            terms.append(Term(hidden_KW=low_KR, weight_VW=self.lora_B[name].weight))
    return terms


def _softcap(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _known_head(model: PreTrainedModel) -> bool:
    """Whether logits follow from hidden states, head and soft cap alone, tested on a copy with two narrow layers."""
    try:
        # The probe draws weights: without a fork it would shift the random numbers of the run.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            config = narrowed(copy.deepcopy(model.config))
            config._attn_implementation = "eager"  # on a CPU, whatever kernels the model itself uses
            small: Any = type(model)(config).float().eval()
            head = small.get_output_embeddings()
            head.weight.normal_()
            ids_BT = torch.arange(1, 4)[None]
            hidden_BTW = getattr(small, small.base_model_prefix)(input_ids=ids_BT, use_cache=False).last_hidden_state
            logits_BTV = head(hidden_BTW)
            cap = _softcap(small)
            logits_BTV = logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)
            own_BTV = small(input_ids=ids_BT, use_cache=False).logits
            return logits_BTV.shape == own_BTV.shape and torch.allclose(
                logits_BTV, own_BTV, rtol=0, atol=PROBE_TOLERANCE
            )
    except Exception:  # any architecture's own code
        return False

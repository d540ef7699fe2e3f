"""The loss head: from hidden states to log-probabilities in chunks, logits never whole; knows tensors only: must not import the rest.

K trained tokens, C of them in a chunk, W hidden size, V vocabulary entries. What it costs stands in estimate/loss_head.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.estimate.loss_head import chunk_rows
from orchestrator.kernels import HeadKernel


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What happens to the products of hidden states and weights before they are logits, and what is asked for."""

    softcap: float | None = None
    """Logits become softcap x tanh(logits / softcap), as in Gemma 2 (2408.00118)."""
    temperature: float = 1.0
    entropies: bool = False
    is_summed: bool = False
    """The caller promises to sum the log-probabilities, whatever it multiplies the sum by: all have one gradient."""
    rows: int | None = None
    """Tokens of a chunk; None takes `chunk_rows`."""
    kernel: HeadKernel = "torch"
    """Who may make the log-probabilities where another kernel than this module's takes what is asked for."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """A product that the logits are a sum of: the head itself, or a low-rank adapter on it."""

    hidden_KW: torch.Tensor
    weight_VW: torch.Tensor


def chunked_logprobs_K(
    terms: Sequence[Term], bias_V: torch.Tensor | None, targets_K: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log p of each target in nats, entropy of its distribution where asked for), K each, in at least fp32.

    Logits are the sum of hidden_KW @ weight_VW.T over the terms, plus the bias. Differentiable in hidden states, weights
    and bias, but for the entropies. Weights are used in the type of the hidden states.
    """
    assert shape.temperature > 0, shape.temperature
    tensors = [term.hidden_KW for term in terms] + [term.weight_VW for term in terms]
    logprobs_K, entropies_K = _ChunkedHead.apply(shape, targets_K, bias_V, *tensors)
    return logprobs_K, entropies_K if shape.entropies else None


class _ChunkedHead(torch.autograd.Function):
    """Frozen weights, or log-probabilities that are summed: every gradient is made in the forward pass and scaled in the backward pass.

    Trained weights else: the hidden states are kept, and the backward pass makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, shape: Shape, targets_K: torch.Tensor, bias_V: Any, *tensors: torch.Tensor) -> Any:
        hiddens, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        needs = ctx.needs_input_grad[2:]
        trains_head = needs[0] or any(needs[1 + len(hiddens) :])
        at_once = any(needs) and (shape.is_summed or not trains_head)
        vocabulary, width = weights[0].shape
        rows = chunk_rows(vocabulary, targets_K.device.type, trained_width=width if trains_head else 0)
        shape = shape if shape.rows else replace(shape, rows=rows)
        with torch.autocast(targets_K.device.type, enabled=False):
            run = _Run(shape, targets_K, bias_V, hiddens, weights)
            gradients = _Gradients(needs, bias_V, run.hiddens, run.weights) if at_once else None
            logprobs_K, entropies_K = run.forward(gradients)
        ctx.shape, ctx.trains_head, ctx.at_once = shape, trains_head, at_once
        ctx.mark_non_differentiable(entropies_K)
        if gradients is not None:
            ctx.save_for_backward(*gradients.as_types_of(bias_V, weights))
        elif trains_head:
            ctx.save_for_backward(targets_K, bias_V, *tensors)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, scale_K: torch.Tensor, _: torch.Tensor) -> Any:  # type: ignore[override]
        if ctx.at_once:
            return None, None, *_scaled(ctx.saved_tensors, scale_K)
        targets_K, bias_V, *tensors = ctx.saved_tensors
        hiddens, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        with torch.autocast(targets_K.device.type, enabled=False):
            run = _Run(ctx.shape, targets_K, bias_V, hiddens, weights)
            gradients = _Gradients(ctx.needs_input_grad[2:], bias_V, run.hiddens, run.weights)
            run.backward(scale_K, gradients)
        return None, None, *gradients.as_types_of(bias_V, weights)


def _scaled(gradients: Sequence[torch.Tensor | None], scale_K: torch.Tensor) -> list[torch.Tensor | None]:
    """Bias, hidden states, weights: those of tokens by each token's scale, the sums over tokens by the one scale of all.

    The sums are scaled where they stand: autograd refuses a second backward pass over them.
    """
    bias_V, *pairs = gradients
    hiddens, weights = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    scale_K1 = scale_K.unsqueeze(1)
    by_hidden = [
        None if one_KW is None else torch.mul(one_KW, scale_K1, out=torch.empty_like(one_KW)) for one_KW in hiddens
    ]
    scale = scale_K[0] if len(scale_K) else scale_K.new_zeros(())
    return [
        None if bias_V is None else bias_V.mul_(scale),
        *by_hidden,
        *(None if one is None else one.mul_(scale) for one in weights),
    ]


class _Gradients:
    """Room for the gradients that are asked for, and how a chunk of tokens adds to them; sums over tokens in at least fp32."""

    def __init__(
        self,
        needs: Sequence[bool],
        bias_V: torch.Tensor | None,
        hiddens: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
    ) -> None:
        """`needs` of the bias, of every hidden and of every weight."""
        compute = hiddens[0].dtype
        precise, number = torch.promote_types(compute, torch.float32), len(hiddens)
        self._hiddens, self._weights = hiddens, weights
        self._bias_V = torch.zeros_like(bias_V, dtype=precise) if needs[0] else None  # type: ignore[arg-type]
        self._by_hidden = [
            torch.empty_like(hidden) if wanted else None
            for hidden, wanted in zip(hiddens, needs[1 : 1 + number], strict=True)
        ]
        self._by_weight = [
            torch.zeros_like(weight, dtype=precise) if wanted else None
            for weight, wanted in zip(weights, needs[1 + number :], strict=True)
        ]
        self._scratch = [
            None if one is None or one.dtype == compute else torch.empty_like(one, dtype=compute)
            for one in self._by_weight
        ]

    def add(self, chunk: slice, by_logits_CV: torch.Tensor) -> None:
        """Takes the gradient of what is minimised by the logits of a chunk."""
        if self._bias_V is not None:
            self._bias_V += by_logits_CV.sum(0)
        by_logits_CV = by_logits_CV.to(self._hiddens[0].dtype)
        for place, hidden_KW in enumerate(self._hiddens):
            if (gradient_KW := self._by_hidden[place]) is not None:
                torch.mm(by_logits_CV, self._weights[place], out=gradient_KW[chunk])
            if (gradient_VW := self._by_weight[place]) is not None:
                _add_product(gradient_VW, by_logits_CV.t(), hidden_KW[chunk], self._scratch[place])

    def as_types_of(self, bias_V: torch.Tensor | None, weights: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Of the bias, of every hidden and of every weight, each in the type of what it is the gradient of."""
        types = [None if bias_V is None else bias_V.dtype, *(hidden.dtype for hidden in self._hiddens)]
        types += [weight.dtype for weight in weights]
        found = [self._bias_V, *self._by_hidden, *self._by_weight]
        return [None if one is None else one.to(dtype) for one, dtype in zip(found, types, strict=True)]


class _Run:
    """One pass over the chunks."""

    def __init__(
        self,
        shape: Shape,
        targets_K: torch.Tensor,
        bias_V: torch.Tensor | None,
        hiddens: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
    ) -> None:
        self._shape, self._targets_K, self.hiddens = shape, targets_K, hiddens
        self.weights = [weight.to(hidden.dtype) for hidden, weight in zip(hiddens, weights, strict=True)]
        self._bias_V = bias_V
        self._precise = torch.promote_types(hiddens[0].dtype, torch.float32)

    def forward(self, gradients: _Gradients | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities, entropies); the gradients of the log-probabilities' sum where there is room for them."""
        logprobs_K = self._targets_K.new_empty(len(self._targets_K), dtype=self._precise)
        entropies_K = logprobs_K.new_zeros(len(self._targets_K) if self._shape.entropies else 0)
        for chunk in self._chunks():
            logprobs_CV, slope_CV = self._logprobs_CV(chunk)
            targets_C1 = self._targets_K[chunk].unsqueeze(1)
            logprobs_K[chunk] = logprobs_CV.gather(1, targets_C1).squeeze(1)
            if self._shape.entropies:
                entropies_K[chunk] = -(logprobs_CV.exp() * logprobs_CV).sum(1)
            if gradients is not None:
                gradients.add(chunk, self._by_logits_CV(logprobs_CV, slope_CV, targets_C1))
        return logprobs_K, entropies_K

    def backward(self, scale_K: torch.Tensor, gradients: _Gradients) -> None:
        """The logits once more, and the gradients of the log-probabilities' sum, each times its scale."""
        for chunk in self._chunks():
            logprobs_CV, slope_CV = self._logprobs_CV(chunk)
            by_logits_CV = self._by_logits_CV(logprobs_CV, slope_CV, self._targets_K[chunk].unsqueeze(1))
            gradients.add(chunk, by_logits_CV.mul_(scale_K[chunk].unsqueeze(1)))

    def _chunks(self) -> Iterator[slice]:
        tokens, rows = len(self._targets_K), self._shape.rows
        assert rows is not None, "it is settled before"
        return (slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows))

    def _logprobs_CV(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of every vocabulary entry; the derivative of the capped logits where they are capped."""
        (hidden_KW, *more), (weight_VW, *others) = self.hiddens, self.weights
        logits_CV = hidden_KW[chunk] @ weight_VW.t()
        for other_KW, other_VW in zip(more, others, strict=True):
            logits_CV.addmm_(other_KW[chunk], other_VW.t())
        if self._bias_V is not None:
            logits_CV += self._bias_V
        logits_CV, slope_CV = logits_CV.to(self._precise), None
        if self._shape.softcap is not None:
            tanh_CV = logits_CV.div_(self._shape.softcap).tanh_()
            logits_CV, slope_CV = tanh_CV * self._shape.softcap, 1 - tanh_CV.square()
        if self._shape.temperature != 1:
            logits_CV.div_(self._shape.temperature)
        return logits_CV.log_softmax(1), slope_CV

    def _by_logits_CV(
        self, logprobs_CV: torch.Tensor, slope_CV: torch.Tensor | None, targets_C1: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of each target's log-probability by the products: (1 at the target) - p. Takes logprobs_CV's place."""
        by_logits_CV = logprobs_CV.exp_().neg_()
        by_logits_CV.scatter_add_(1, targets_C1, by_logits_CV.new_ones(()).expand_as(targets_C1))
        if self._shape.temperature != 1:
            by_logits_CV.div_(self._shape.temperature)
        return by_logits_CV if slope_CV is None else by_logits_CV.mul_(slope_CV)


def _add_product(
    sum_VW: torch.Tensor, left_VC: torch.Tensor, right_CW: torch.Tensor, scratch_VW: torch.Tensor | None
) -> None:
    """sum_VW += left_VC @ right_CW, through a scratch of the factors' type where that is not the sum's."""
    if scratch_VW is None:
        sum_VW.addmm_(left_VC, right_CW)
    else:
        sum_VW += torch.mm(left_VC, right_CW, out=scratch_VW)

"""The loss head: from hidden states to log-probabilities in chunks, logits never whole; knows tensors only: must not import the rest.

K trained tokens, C of them in a chunk, W hidden size, V vocabulary entries. What it costs, for a forecast of memory:

- a chunk has `chunk_rows` rows: as many as fit `CPU_CHUNK_BYTES` or `GPU_CHUNK_BYTES` of fp32 logits; at least `LEAST_ROWS`, and
  where the head's weight is trained at least a quarter of the hidden size, because each chunk adds to a gradient of V x W;
- kept from forward to backward: `kept_bytes_per_token` a trained token (a gradient where the head's weights are frozen, the
  hidden state where they are trained; never logits);
- for the time of the call: `TEMPORARY_LOGITS` times a chunk's fp32 logits; where the weights are trained, in the backward
  pass also V x W x (4 bytes + 2 x those of the compute type) at the end of it, of which the last part is the gradient that
  stays; where autocast runs fp32 weights in 16 bits, a 16-bit copy (V x W x 2 bytes) in each of the two passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

CPU_CHUNK_BYTES = 48 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
"""Of a chunk's fp32 logits. Below about 64 rows the products slow down; above, more rows win nothing (`benchmarks/head.py`)."""
LEAST_ROWS = 32
"""Of a chunk: fewer make a matrix product slow."""
TEMPORARY_LOGITS = 3.5
"""fp32 logits, their log-probabilities, those of the chunk before, and 16-bit copies; 2 more with a soft cap or entropies."""
TARGET_BYTES = 8


def chunk_rows(vocabulary: int, device_type: str, *, trained_width: int = 0) -> int:
    """C: how many tokens are scored at a time; `trained_width` is the hidden size where the head's weight is trained."""
    allowed = CPU_CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    return max(LEAST_ROWS, trained_width // 4, allowed // (4 * vocabulary))


def kept_bytes_per_token(hidden_size: int, compute_bytes: int) -> int:
    """Kept from forward to backward for each trained token."""
    return hidden_size * compute_bytes + TARGET_BYTES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What happens to the products of hidden states and weights before they are logits, and what is asked for."""

    softcap: float | None = None
    """Logits become softcap x tanh(logits / softcap), as in Gemma 2 (2408.00118)."""
    temperature: float = 1.0
    entropies: bool = False
    rows: int | None = None
    """Tokens of a chunk; None takes `chunk_rows`."""


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
    """Frozen weights: the gradient of every hidden state is made in the forward pass, and scaled in the backward pass.

    Trained weights: the hidden states are kept, and the backward pass makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, shape: Shape, targets_K: torch.Tensor, bias_V: Any, *tensors: torch.Tensor) -> Any:
        hiddens, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        _, _, needs_bias, *needs = ctx.needs_input_grad
        trains_head = needs_bias or any(needs[len(hiddens) :])
        keeps_gradients = any(needs[: len(hiddens)]) and not trains_head
        vocabulary, width = weights[0].shape
        rows = chunk_rows(vocabulary, targets_K.device.type, trained_width=width if trains_head else 0)
        shape = shape if shape.rows else replace(shape, rows=rows)
        with torch.autocast(targets_K.device.type, enabled=False):
            run = _Run(shape, targets_K, bias_V, hiddens, weights)
            logprobs_K, entropies_K, gradients = run.forward(keeps_gradients)
        ctx.shape, ctx.trains_head = shape, trains_head
        ctx.mark_non_differentiable(entropies_K)
        if trains_head:
            ctx.save_for_backward(targets_K, bias_V, *tensors)
        elif keeps_gradients:
            ctx.save_for_backward(*gradients)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, scale_K: torch.Tensor, _: torch.Tensor) -> Any:  # type: ignore[override]
        if not ctx.trains_head:
            scale_K1 = scale_K.unsqueeze(1)
            scaled = [torch.mul(unit_KW, scale_K1, out=torch.empty_like(unit_KW)) for unit_KW in ctx.saved_tensors]
            return None, None, None, *scaled, *[None] * len(scaled)
        targets_K, bias_V, *tensors = ctx.saved_tensors
        hiddens, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        with torch.autocast(targets_K.device.type, enabled=False):
            run = _Run(ctx.shape, targets_K, bias_V, hiddens, weights)
            return None, None, *run.backward(scale_K, ctx.needs_input_grad[2:])


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
        self._shape, self._targets_K, self._hiddens = shape, targets_K, hiddens
        self._weights = [weight.to(hidden.dtype) for hidden, weight in zip(hiddens, weights, strict=True)]
        self._types = [weight.dtype for weight in weights]
        self._bias_V = bias_V
        self._compute = hiddens[0].dtype
        self._precise = torch.promote_types(self._compute, torch.float32)

    def forward(self, keeps_gradients: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(log-probabilities, entropies, the gradient of each log-probability by its hidden states where these are kept)."""
        logprobs_K = self._targets_K.new_empty(len(self._targets_K), dtype=self._precise)
        entropies_K = logprobs_K.new_zeros(len(self._targets_K) if self._shape.entropies else 0)
        gradients = [torch.empty_like(hidden) for hidden in self._hiddens] if keeps_gradients else []
        for chunk in self._chunks():
            logprobs_CV, slope_CV = self._logprobs_CV(chunk)
            targets_C1 = self._targets_K[chunk].unsqueeze(1)
            logprobs_K[chunk] = logprobs_CV.gather(1, targets_C1).squeeze(1)
            if self._shape.entropies:
                entropies_K[chunk] = -(logprobs_CV.exp() * logprobs_CV).sum(1)
            if keeps_gradients:
                by_logits_CV = self._by_logits_CV(logprobs_CV, slope_CV, targets_C1).to(self._compute)
                for gradient_KW, weight_VW in zip(gradients, self._weights, strict=True):
                    torch.mm(by_logits_CV, weight_VW, out=gradient_KW[chunk])
        return logprobs_K, entropies_K, gradients

    def backward(self, scale_K: torch.Tensor, needs: Sequence[bool]) -> list[torch.Tensor | None]:
        """The gradients of the bias, of every hidden and of every weight, where they are needed; weights' sums in fp32."""
        number = len(self._hiddens)
        wants_bias, wants_hidden, wants_weight = needs[0], needs[1 : 1 + number], needs[1 + number :]
        by_bias_V = torch.zeros_like(self._bias_V, dtype=self._precise) if wants_bias else None  # type: ignore[arg-type]
        by_hidden = [
            torch.empty_like(hidden) if wanted else None
            for hidden, wanted in zip(self._hiddens, wants_hidden, strict=True)
        ]
        by_weight = [
            torch.zeros_like(weight, dtype=self._precise) if wanted else None
            for weight, wanted in zip(self._weights, wants_weight, strict=True)
        ]
        scratch = [
            None if one is None or one.dtype == self._compute else torch.empty_like(one, dtype=self._compute)
            for one in by_weight
        ]
        for chunk in self._chunks():
            logprobs_CV, slope_CV = self._logprobs_CV(chunk)
            by_logits_CV = self._by_logits_CV(logprobs_CV, slope_CV, self._targets_K[chunk].unsqueeze(1))
            by_logits_CV.mul_(scale_K[chunk].unsqueeze(1))
            if by_bias_V is not None:
                by_bias_V += by_logits_CV.sum(0)
            by_logits_CV = by_logits_CV.to(self._compute)
            for place, hidden_KW in enumerate(self._hiddens):
                if (gradient_KW := by_hidden[place]) is not None:
                    torch.mm(by_logits_CV, self._weights[place], out=gradient_KW[chunk])
                if (gradient_VW := by_weight[place]) is not None:
                    _add_product(gradient_VW, by_logits_CV.t(), hidden_KW[chunk], scratch[place])
        types = [None if self._bias_V is None else self._bias_V.dtype, *[self._compute] * number, *self._types]
        found = [by_bias_V, *by_hidden, *by_weight]
        return [None if one is None else one.to(dtype) for one, dtype in zip(found, types, strict=True)]

    def _chunks(self) -> Iterator[slice]:
        tokens, rows = len(self._targets_K), self._shape.rows
        assert rows is not None, "it is settled before"
        return (slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows))

    def _logprobs_CV(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of every vocabulary entry; the derivative of the capped logits where they are capped."""
        (hidden_KW, *more), (weight_VW, *others) = self._hiddens, self._weights
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

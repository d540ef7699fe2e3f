"""The loss head: log-probabilities from hidden states in chunks, never the whole logits; knows tensors only.

K trained tokens, C of them in a chunk, L of these in a block, W hidden size, V vocabulary entries. A chunk is one
matrix product, a block is what is scored at once, in at least fp32: on a CPU few rows, so that they stay in its cache.
For its cost see architecture/loss_head_chunks.py. Must not import the rest of the orchestrator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.architecture.kernels import HeadKernel
from orchestrator.architecture.loss_head_chunks import block_rows, chunk_rows
from orchestrator.losses.chunked_head_gradients import HeadGradients, scaled


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What happens to the products of hidden states and weights before they are logits, and what is requested."""

    softcap: float | None = None
    """Logits become softcap x tanh(logits / softcap), as in Gemma 2 (2408.00118)."""
    temperature: float = 1.0
    entropies: bool = False
    is_summed: bool = False
    """The caller promises to only sum the log-probabilities, with any factor: they share one gradient scale."""
    rows: int | None = None
    """Tokens of a chunk; None takes `chunk_rows`."""
    kernel: HeadKernel = "torch"
    """The kernel that computes the log-probabilities if it supports the request; otherwise this module does."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One of the products whose sum is the logits: the head itself, or a low-rank adapter on it."""

    hidden_KW: torch.Tensor
    weight_VW: torch.Tensor


def chunked_logprobs_K(
    terms: Sequence[Term], bias_V: torch.Tensor | None, targets_K: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log p of each target in nats, entropy of its distribution if requested), K each, in at least fp32.

    Logits are the sum of hidden_KW @ weight_VW.T over the terms, plus the bias. Differentiable in hidden states,
    weights and bias, except for the entropies. Weights are used in the dtype of the hidden states.
    """
    assert shape.temperature > 0, shape.temperature
    tensors = [term.hidden_KW for term in terms] + [term.weight_VW for term in terms]
    logprobs_K, entropies_K = _ChunkedHead.apply(shape, torch.is_grad_enabled(), targets_K, bias_V, *tensors)
    return logprobs_K, entropies_K if shape.entropies else None


class _ChunkedHead(torch.autograd.Function):
    """With frozen weights or summed log-probabilities the forward pass makes all gradients, the backward scales them.

    Otherwise (trained weights) the hidden states are kept, and the backward pass recomputes the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, shape: Shape, wants_gradients: bool, targets_K: torch.Tensor, bias_V: Any, *tensors: torch.Tensor
    ) -> Any:
        hiddens, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        needs = [wants_gradients and needed for needed in ctx.needs_input_grad[3:]]  # true of weights under no_grad too
        trains_head = needs[0] or any(needs[1 + len(hiddens) :])
        at_once = any(needs) and (shape.is_summed or not trains_head)
        vocabulary, width = weights[0].shape
        rows = chunk_rows(vocabulary, targets_K.device.type, trained_width=width if trains_head else 0)
        shape = shape if shape.rows else replace(shape, rows=rows)
        # The products run in the type of the hidden states, as chosen here; autocast would choose again.
        with torch.autocast(targets_K.device.type, enabled=False):
            run = _Run(shape, targets_K, bias_V, hiddens, weights)
            gradients = HeadGradients(needs, bias_V, run.hiddens, run.weights) if at_once else None
            logprobs_K, entropies_K = run.forward(gradients)
        ctx.shape, ctx.trains_head, ctx.at_once = shape, trains_head, at_once
        ctx.mark_non_differentiable(entropies_K)
        if gradients is not None:
            ctx.save_for_backward(*gradients.as_types_of(bias_V, weights))
        elif trains_head:
            ctx.save_for_backward(targets_K, bias_V, *tensors)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, scale_K: torch.Tensor, _: torch.Tensor) -> Any:
        if ctx.at_once:
            return None, None, None, *scaled(ctx.saved_tensors, scale_K)
        targets_K, bias_V, *tensors = ctx.saved_tensors
        hiddens, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        with torch.autocast(targets_K.device.type, enabled=False):
            run = _Run(ctx.shape, targets_K, bias_V, hiddens, weights)
            gradients = HeadGradients(ctx.needs_input_grad[3:], bias_V, run.hiddens, run.weights)
            run.backward(-scale_K, gradients)
        return None, None, None, *gradients.as_types_of(bias_V, weights)


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
        compute, vocabulary = hiddens[0].dtype, len(weights[0])
        self._precise = torch.promote_types(compute, torch.float32)
        assert shape.rows is not None, "it is settled before"
        rows = min(shape.rows, len(targets_K))
        self._block_rows = block_rows(vocabulary, targets_K.device.type, rows=rows)
        block = hiddens[0].new_empty(self._block_rows, vocabulary, dtype=self._precise)
        # One buffer for all chunks: 48 MiB of fp32 on a CPU, 256 MiB on a GPU, never tokens x vocabulary.
        self._products = hiddens[0].new_empty(rows, vocabulary)
        self._probabilities = block
        self._logits = None if compute == self._precise else torch.empty_like(block)
        self._slopes = None if shape.softcap is None else torch.empty_like(block)

    def forward(self, gradients: HeadGradients | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities, entropies); adds the gradients of the negative sum if `gradients` are given."""
        logprobs_K = self._targets_K.new_empty(len(self._targets_K), dtype=self._precise)
        entropies_K = logprobs_K.new_zeros(len(self._targets_K) if self._shape.entropies else 0)
        for chunk in self._chunks():
            products_CV = self._products_CV(chunk)
            for rows in _parts(chunk.start, chunk.stop, self._block_rows):
                scored = self._scored(products_CV, chunk, rows)
                logprobs_K[rows] = scored.logprobs_L
                if scored.entropies_L is not None:
                    entropies_K[rows] = scored.entropies_L
                if gradients is not None:
                    self._keep_gradient(scored, products_CV, gradients)
            if gradients is not None:
                gradients.add(chunk, products_CV)
        return logprobs_K, entropies_K

    def backward(self, scale_K: torch.Tensor, gradients: HeadGradients) -> None:
        """Recompute the logits and the gradients of the negative log-probabilities' sum, each times its scale."""
        for chunk in self._chunks():
            products_CV = self._products_CV(chunk)
            for rows in _parts(chunk.start, chunk.stop, self._block_rows):
                scored = self._scored(products_CV, chunk, rows)
                self._keep_gradient(scored, products_CV, gradients, scale_K[rows].unsqueeze(1))
            gradients.add(chunk, products_CV)

    def _chunks(self) -> Iterator[slice]:
        return _parts(0, len(self._targets_K), max(1, len(self._products)))

    def _products_CV(self, chunk: slice) -> torch.Tensor:
        """Hidden states times weights, in the compute dtype, in one buffer shared by all chunks."""
        (hidden_KW, *more), (weight_VW, *others) = self.hiddens, self.weights
        products_CV = torch.mm(hidden_KW[chunk], weight_VW.t(), out=self._products[: chunk.stop - chunk.start])
        for other_KW, other_VW in zip(more, others, strict=True):
            products_CV.addmm_(other_KW[chunk], other_VW.t())
        if self._bias_V is not None:
            products_CV += self._bias_V
        return products_CV

    def _scored(self, products_CV: torch.Tensor, chunk: slice, rows: slice) -> _Scored:
        """Score the targets of a block of rows. Overwrites the products if they are precise enough."""
        block = slice(rows.start - chunk.start, rows.stop - chunk.start)
        logits_LV, slope_LV = self._logits_LV(products_CV[block])
        targets_L1 = self._targets_K[rows].unsqueeze(1)
        target_L1, most_L1 = logits_LV.gather(1, targets_L1), logits_LV.amax(1, keepdim=True)
        p_LV = torch.softmax(logits_LV, 1, out=self._probabilities[: len(logits_LV)])
        likeliest_L1 = p_LV.amax(1, keepdim=True).log()  # any other log p differs by the difference of the logits
        logprobs_L = (target_L1 - most_L1 + likeliest_L1).squeeze(1)
        entropies_L = None
        if self._shape.entropies:
            entropies_L = -logits_LV.sub_(most_L1).add_(likeliest_L1).mul_(p_LV).sum(1)
        return _Scored(block, targets_L1, logprobs_L, entropies_L, p_LV, slope_LV)

    def _logits_LV(self, products_LV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits in at least fp32; with a soft cap, also the derivative of the capped logits."""
        logits_LV, slope_LV = products_LV, None
        if self._logits is not None:
            logits_LV = self._logits[: len(products_LV)].copy_(products_LV)
        if self._shape.softcap is not None:
            tanh_LV = logits_LV.div_(self._shape.softcap).tanh_()
            assert self._slopes is not None
            slope_LV = torch.square(tanh_LV, out=self._slopes[: len(tanh_LV)]).neg_().add_(1)
            logits_LV = tanh_LV.mul_(self._shape.softcap)
        if self._shape.temperature != 1:
            logits_LV.div_(self._shape.temperature)
        return logits_LV, slope_LV

    def _keep_gradient(
        self, scored: _Scored, products_CV: torch.Tensor, gradients: HeadGradients, scale_L1: torch.Tensor | None = None
    ) -> None:
        """Overwrite the products with the gradient of -log p by them: p - (1 at the target)."""
        by_logits_LV = scored.p_LV
        by_logits_LV.scatter_add_(1, scored.targets_L1, by_logits_LV.new_full((), -1).expand_as(scored.targets_L1))
        if scale_L1 is not None:
            by_logits_LV.mul_(scale_L1)
        if self._shape.temperature != 1:
            by_logits_LV.div_(self._shape.temperature)
        if scored.slope_LV is not None:
            by_logits_LV.mul_(scored.slope_LV)
        gradients.add_bias(by_logits_LV)
        products_CV[scored.block] = by_logits_LV


@dataclass(frozen=True)
class _Scored:
    """A block of L tokens of a chunk: log-probabilities, entropies, and the inputs of the gradient."""

    block: slice
    targets_L1: torch.Tensor
    logprobs_L: torch.Tensor
    entropies_L: torch.Tensor | None
    p_LV: torch.Tensor
    slope_LV: torch.Tensor | None


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))

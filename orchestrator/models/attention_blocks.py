"""Causal attention over many short documents as blocks of matrix products, for CPUs in 16 bits; exact, own backward.

Letters of shapes: H query heads, K key heads, G = H / K, S positions of all rows concatenated, D channels of a head,
n documents of a group, L tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch

from orchestrator.architecture.kernels import BLOCK_TOKENS

KEPT_TOKENS = 256
"""Blocks up to this length keep their attention weights for the backward pass; longer ones recompute them."""
BLOCK_SCORES = 1 << 16
"""Maximum scores per head of documents computed together: more would leave the processor's cache."""
GROUP_RATIO = 0.75
"""Documents are computed together if the shorter has at least this share of the longer one's tokens."""


def attend_in_blocks(
    query_HSD: torch.Tensor, key_KSD: torch.Tensor, value_KSD: torch.Tensor, plan: tuple[Group, ...], scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v within each document, as [S, H, D]."""
    return cast("torch.Tensor", Blocks.apply(query_HSD, key_KSD, value_KSD, plan, scale))


@dataclass(frozen=True, eq=False)
class Group:
    """n documents of at most L tokens. `positions` are the positions of their tokens, row by row, each row padded to L."""

    num: int
    length: int
    positions_nL: torch.Tensor
    real: torch.Tensor | None
    """Which of these positions are real; None if all are."""

    @property
    def real_positions(self) -> torch.Tensor:
        return self.positions_nL if self.real is None else self.positions_nL[self.real]


@lru_cache(maxsize=16)
def plan_groups(edges: tuple[int, ...]) -> tuple[Group, ...] | None:
    """Groups of documents of similar length; None if one exceeds BLOCK_TOKENS. Cached: every layer asks again."""
    documents = sorted(((stop - start, start) for start, stop in pairwise(edges) if stop > start), reverse=True)
    if not documents or documents[0][0] > BLOCK_TOKENS:
        return None
    groups: list[list[tuple[int, int]]] = []
    for length, start in documents:
        longest = groups[-1][0][0] if groups else 0
        if not groups or length < GROUP_RATIO * longest or (len(groups[-1]) + 1) * longest**2 > BLOCK_SCORES:
            groups.append([])
        groups[-1].append((length, start))
    return tuple(_group(members) for members in groups)


def _group(members: Sequence[tuple[int, int]]) -> Group:
    lengths = torch.tensor([length for length, _ in members])
    starts = torch.tensor([start for _, start in members])
    longest = int(lengths[0])
    steps = torch.arange(longest)
    real = (steps[None, :] < lengths[:, None]).reshape(-1)
    positions = (starts[:, None] + torch.minimum(steps[None, :], lengths[:, None] - 1)).reshape(-1)
    return Group(len(members), longest, positions, None if bool(real.all()) else real)


@lru_cache(maxsize=64)
def _causal_bias(length: int, heads_per_key: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, heads_per_key * L, L]: -inf above the diagonal."""
    return torch.full((length, length), float("-inf")).triu(1).to(dtype).repeat(heads_per_key, 1)[None]


class Blocks(torch.autograd.Function):
    """softmax(q k^T * scale) v within each document. H query heads, K key heads, G = H / K, N = n * K blocks of [G*L, L]."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HSD: torch.Tensor,
        key_KSD: torch.Tensor,
        value_KSD: torch.Tensor,
        plan: tuple[Group, ...],
        scale: float,
    ) -> torch.Tensor:
        H, S, _ = query_HSD.shape
        G = H // key_KSD.shape[0]
        out_SHD = value_KSD.new_zeros(S, H, value_KSD.shape[-1])
        kept: list[torch.Tensor] = []
        for group in plan:
            q, k, v = (
                _gather(tensor, group, heads) for tensor, heads in ((query_HSD, G), (key_KSD, 1), (value_KSD, 1))
            )
            weights = _weights(q, k, group.length, G, scale)
            out = torch.bmm(weights, v)
            out = (
                out.view(group.num, -1, G, group.length, out.shape[-1])
                .permute(0, 3, 1, 2, 4)
                .reshape(-1, H, out.shape[-1])
            )
            out_SHD.index_copy_(0, group.real_positions, out if group.real is None else out[group.real])
            if group.length <= KEPT_TOKENS:
                kept.append(weights)
        ctx.save_for_backward(query_HSD, key_KSD, value_KSD, *kept)
        ctx.plan, ctx.scale = plan, scale
        return out_SHD

    @staticmethod
    def backward(ctx: Any, grad_SHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        H, K = query.shape[0], key.shape[0]
        G, scale = H // K, ctx.scale
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        kept = iter(saved)
        for group in ctx.plan:
            q, k, v = (_gather(tensor, group, heads) for tensor, heads in ((query, G), (key, 1), (value, 1)))
            weights = next(kept) if group.length <= KEPT_TOKENS else _weights(q, k, group.length, G, scale)
            grad = grad_SHD.index_select(0, group.positions_nL)
            if group.real is not None:
                grad[~group.real] = 0
            grad = (
                grad.view(group.num, group.length, K, G, -1)
                .permute(0, 2, 3, 1, 4)
                .reshape(group.num * K, G * group.length, -1)
            )
            grad_weights = torch.bmm(grad, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # pyright: ignore[reportPrivateImportUsage]  # no public name
            grad_scores = grad_scores.mul_(scale)
            _scatter(grads[0], group, torch.bmm(grad_scores, k), G)
            _scatter(grads[1], group, torch.bmm(grad_scores.transpose(1, 2), q), 1)
            _scatter(grads[2], group, torch.bmm(weights.transpose(1, 2), grad), 1)
        return (*grads, None, None)


def _weights(q: torch.Tensor, k: torch.Tensor, length: int, heads_per_key: int, scale: float) -> torch.Tensor:
    bias = _causal_bias(length, heads_per_key, q.dtype).expand(q.shape[0], -1, -1)
    return torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale), dim=-1)


def _gather(tensor_HSD: torch.Tensor, group: Group, heads_per_key: int) -> torch.Tensor:
    """[H, S, D] -> [n*K, G*L, D]: the group's documents, with the query heads of one key head below each other."""
    H, _, D = tensor_HSD.shape
    K = H // heads_per_key
    picked = tensor_HSD.index_select(1, group.positions_nL).view(K, heads_per_key, group.num, group.length, D)
    return picked.permute(2, 0, 1, 3, 4).reshape(group.num * K, heads_per_key * group.length, D)


def _scatter(grad_HSD: torch.Tensor, group: Group, part: torch.Tensor, heads_per_key: int) -> None:
    """The inverse of `_gather`, for the real positions."""
    H, _, D = grad_HSD.shape
    K = H // heads_per_key
    laid = part.view(group.num, K, heads_per_key, group.length, D).permute(1, 2, 0, 3, 4).reshape(H, -1, D)
    grad_HSD.index_copy_(1, group.real_positions, laid if group.real is None else laid[:, group.real])

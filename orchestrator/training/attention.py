"""Exact attention in which documents of a packed row never see each other, without a dense mask over the row.

One name, `documents`, for transformers' `attn_implementation`. What is computed follows from the machine:
- CPU, 16-bit, short documents: documents of like length are multiplied together as blocks (the flash kernels of torch are
  slow on CPU in 16 bits: figures in docs/data.md);
- CPU otherwise: torch's flash kernel document by document;
- CUDA, 16-bit: torch's `varlen_attn`, one kernel over all documents.
Boundaries come as `cu_seq_lens_q` (`Batch.model_inputs`) or, where a caller gives none, from restarting position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn import functional

DOCUMENTS = "documents"
BLOCK_TOKENS = 512
"""Documents up to this long are computed as blocks in 16 bits; longer ones by the flash kernel, whose memory is linear."""
KEPT_TOKENS = 256
"""Blocks up to this long keep their weights for the backward pass; longer ones compute them again."""
BLOCK_SCORES = 1 << 16
"""Documents are computed together up to so many scores a head: more leave the processor's cache."""
GROUP_RATIO = 0.75
"""Documents are computed together where the shorter has at least this share of the longer one's tokens."""


def register() -> None:
    """Makes `documents` known to transformers as an attention and as a mask implementation; may be called again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(DOCUMENTS, documents_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(DOCUMENTS, documents_mask)


def documents_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **settings: Any,
) -> torch.Tensor | None:
    """No mask where boundaries say it all; the dense mask of sdpa for padding masks, caches and windows shorter than the row."""
    from transformers.masking_utils import sdpa_mask

    is_window = local_size is not None and local_size < kv_length
    if attention_mask is None and q_length == kv_length and q_length > 1 and not is_window and not use_vmap and _is_zero(q_offset):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **settings,
    )


def _is_zero(offset: int | torch.Tensor) -> bool:
    return isinstance(offset, int) and offset == 0


def documents_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [B, heads, T, head_dim] queries; returns [B, T, heads, head_dim].

    With a mask, a cache or one query it is transformers' sdpa; else causal within each document.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = is_causal if is_causal is not None else cast("bool", getattr(module, "is_causal", True))
    is_plain = attention_mask is None and causal and query.shape[2] == key.shape[2] and query.shape[2] > 1
    if not is_plain or settings.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **settings
        )
    boundaries = settings.get("cu_seq_lens_q")
    if boundaries is None:
        boundaries = boundaries_of(settings.get("position_ids"), query.shape[0], query.shape[2])
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = _same_dtype(query, key, value)
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0:
        return _varlen(query, key, value, boundaries, settings.get("max_length_q"), scale), None
    edges = tuple(cast("list[int]", boundaries.tolist()))
    if query.dtype == torch.float32 or dropout > 0.0:
        return _one_by_one(query, key, value, edges, scale, dropout), None
    return _in_blocks(query, key, value, edges, scale), None


def boundaries_of(position_ids: torch.Tensor | None, num_rows: int, length: int) -> torch.Tensor:
    """Where documents start in the rows laid end to end, and where the last one ends, as int32."""
    if position_ids is None:
        return torch.arange(0, num_rows * length + 1, length, dtype=torch.int32)
    positions = position_ids.expand(num_rows, -1)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    places = starts.reshape(-1).nonzero().view(-1)
    return torch.cat([places, places.new_tensor([num_rows * length])]).to(torch.int32)


def _same_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast the three in its dtype, as torch's own attention would cast them."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _laid_end_to_end(tensor_BHTD: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [H, B*T, D]; no copy for one row."""
    B, H, T, D = tensor_BHTD.shape
    return tensor_BHTD.transpose(0, 1).reshape(H, B * T, D)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, longest: int | None, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = query.shape
    edges = boundaries.to(device=query.device, dtype=torch.int32)
    most = longest if longest is not None else T
    flat = [tensor.transpose(1, 2).reshape(B * T, tensor.shape[1], -1) for tensor in (query, key, value)]
    out = varlen_attn(
        *flat, edges, edges, most, most, scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1]
    )
    return cast("torch.Tensor", out).view(B, T, query.shape[1], -1)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: tuple[int, ...], scale: float, dropout: float
) -> torch.Tensor:
    """torch's flash kernel over one document after the other."""
    B, H, T, _ = query.shape
    sizes = [stop - start for start, stop in pairwise(edges)]
    parts = [_laid_end_to_end(tensor)[None].split(sizes, dim=2) for tensor in (query, key, value)]
    outs = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2)[0].transpose(0, 1).reshape(B, T, H, -1)


def _in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: tuple[int, ...], scale: float) -> torch.Tensor:
    """Short documents as blocks; where one is too long for that, all go through the flash kernel."""
    plan = plan_groups(edges)
    if plan is None:
        return _one_by_one(query, key, value, edges, scale, 0.0)
    B, H, T, _ = query.shape
    flat = [_laid_end_to_end(tensor) for tensor in (query, key, value)]
    out = cast("torch.Tensor", _Blocks.apply(*flat, plan, scale))
    return out.view(B, T, H, -1)


@dataclass(frozen=True, eq=False)
class Group:
    """n documents of at most L tokens. `places` are their tokens' places, row by row, each row filled up to L."""

    num: int
    length: int
    places_nL: torch.Tensor
    real: torch.Tensor | None
    """Which of the places are real; None where all are."""

    @property
    def real_places(self) -> torch.Tensor:
        return self.places_nL if self.real is None else self.places_nL[self.real]


@lru_cache(maxsize=16)
def plan_groups(edges: tuple[int, ...]) -> tuple[Group, ...] | None:
    """Documents of like length together; None where one is longer than BLOCK_TOKENS. Kept, since every layer asks again."""
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
    places = (starts[:, None] + torch.minimum(steps[None, :], lengths[:, None] - 1)).reshape(-1)
    return Group(len(members), longest, places, None if bool(real.all()) else real)


@lru_cache(maxsize=64)
def _causal_bias(length: int, heads_per_key: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, heads_per_key * L, L]: -inf above the diagonal."""
    return torch.full((length, length), float("-inf")).triu(1).to(dtype).repeat(heads_per_key, 1)[None]


class _Blocks(torch.autograd.Function):
    """softmax(q k^T * scale) v within each document. H query heads, K key heads, G = H / K, N = n * K blocks of [G*L, L]."""

    @staticmethod
    def forward(ctx: Any, query_HSD: torch.Tensor, key_KSD: torch.Tensor, value_KSD: torch.Tensor, plan: tuple[Group, ...], scale: float) -> torch.Tensor:
        H, S, _ = query_HSD.shape
        G = H // key_KSD.shape[0]
        out_SHD = value_KSD.new_zeros(S, H, value_KSD.shape[-1])
        kept: list[torch.Tensor] = []
        for group in plan:
            q, k, v = (_gather(tensor, group, heads) for tensor, heads in ((query_HSD, G), (key_KSD, 1), (value_KSD, 1)))
            weights = _weights(q, k, group.length, G, scale)
            out = torch.bmm(weights, v)
            out = out.view(group.num, -1, G, group.length, out.shape[-1]).permute(0, 3, 1, 2, 4).reshape(-1, H, out.shape[-1])
            out_SHD.index_copy_(0, group.real_places, out if group.real is None else out[group.real])
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
            grad = grad_SHD.index_select(0, group.places_nL)
            if group.real is not None:
                grad[~group.real] = 0
            grad = grad.view(group.num, group.length, K, G, -1).permute(0, 2, 3, 1, 4).reshape(group.num * K, G * group.length, -1)
            grad_weights = torch.bmm(grad, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scale)
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
    picked = tensor_HSD.index_select(1, group.places_nL).view(K, heads_per_key, group.num, group.length, D)
    return picked.permute(2, 0, 1, 3, 4).reshape(group.num * K, heads_per_key * group.length, D)


def _scatter(grad_HSD: torch.Tensor, group: Group, part: torch.Tensor, heads_per_key: int) -> None:
    """The inverse of `_gather`, for the real places."""
    H, _, D = grad_HSD.shape
    K = H // heads_per_key
    laid = part.view(group.num, K, heads_per_key, group.length, D).permute(1, 2, 0, 3, 4).reshape(H, -1, D)
    grad_HSD.index_copy_(1, group.real_places, laid if group.real is None else laid[:, group.real])

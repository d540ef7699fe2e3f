"""Exact attention in which documents of a packed row never see each other, without a dense mask over the row.

Registered as `documents` for `attn_implementation`. The machine determines the path (`kernels.documents_path`):
- CPU, 16-bit, short documents: documents of similar length are multiplied together as blocks (torch's flash kernels
    are slow on CPU in 16 bits: figures in docs/data.md);
- CPU otherwise: torch's flash kernel document by document;
- CUDA, 16-bit: torch's `varlen_attn`, one kernel over all documents, if it supports the heads; else one by one.
Boundaries come as `cu_seq_lens_q` (`Batch.model_inputs`) or, if a caller passes none, from restarting position ids.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn import functional

from orchestrator.architecture.kernels import DOCUMENTS, documents_path
from orchestrator.errors import ConfigError
from orchestrator.models.attention_blocks import attend_in_blocks, plan_groups


def register() -> None:
    """Register `documents` with transformers as an attention and as a mask implementation; may be called again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if DOCUMENTS in ALL_ATTENTION_FUNCTIONS:  # possibly in the form that compiled layers need
        return
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
    """No mask if boundaries suffice; sdpa's dense mask for padding masks, caches and windows shorter than the row."""
    from transformers.masking_utils import sdpa_mask

    is_window = local_size is not None and local_size < kv_length
    if (
        attention_mask is None
        and q_length == kv_length
        and q_length > 1
        and not is_window
        and not use_vmap
        and _is_zero(q_offset)
    ):
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

    With a mask, a cache or a single query it is transformers' sdpa; else causal within each document. ConfigError
    for architectures whose attention needs more than that.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = is_causal if is_causal is not None else cast("bool", getattr(module, "is_causal", True))
    _refuse_unknown(settings, is_packed=settings.get("cu_seq_lens_q") is not None, causal=causal)
    if attention_mask is not None or not causal or query.shape[2] != key.shape[2] or query.shape[2] == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **settings
        )
    boundaries, longest = settings.get("cu_seq_lens_q"), settings.get("max_length_q")
    if boundaries is None:
        B, _, T, _ = query.shape
        boundaries, longest = _boundaries_once(settings.get("position_ids"), B, T, query.device), None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = _same_dtype(query, key, value)
    match documents_path(
        query.device.type,
        is_half=query.element_size() == 2,
        head_dims=(query.shape[-1], value.shape[-1]),
        has_dropout=dropout > 0.0,
    ):
        case "varlen":
            return _varlen(query, key, value, boundaries, longest, scale), None
        case "blocks":
            return _in_blocks(query, key, value, _edges(boundaries), scale), None
        case "one by one":
            return _one_by_one(query, key, value, _edges(boundaries), scale, dropout), None


@lru_cache(maxsize=8)
def _edges(boundaries: torch.Tensor) -> tuple[int, ...]:
    """The boundaries as integers. Cached by tensor: every layer asks, and on a GPU each request waits for it."""
    return tuple(cast("list[int]", boundaries.tolist()))


@lru_cache(maxsize=8)
def _boundaries_once(
    position_ids: torch.Tensor | None, num_rows: int, length: int, device: torch.device
) -> torch.Tensor:
    """`boundaries_of` on the device, cached by tensor like `_edges`: finding restarts waits for a GPU too."""
    return boundaries_of(position_ids, num_rows, length).to(device)


def _refuse_unknown(settings: dict[str, Any], *, is_packed: bool, causal: bool) -> None:
    """Refuse whatever would silently be ignored."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if settings.get(name) is not None]
    if is_packed and not causal:
        unknown.append("attention in both directions over packed rows")
    if unknown:
        raise ConfigError(
            f"model.attention={DOCUMENTS} does not compute {', '.join(unknown)}, which this architecture requires: "
            "set model.attention=eager"
        )


def boundaries_of(position_ids: torch.Tensor | None, num_rows: int, length: int) -> torch.Tensor:
    """Starts of the documents in the concatenated rows, and the end of the last one, as int32."""
    if position_ids is None:
        return torch.arange(0, num_rows * length + 1, length, dtype=torch.int32)
    positions = position_ids.expand(num_rows, -1)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    edges = starts.reshape(-1).nonzero().view(-1)
    return torch.cat([edges, edges.new_tensor([num_rows * length])]).to(torch.int32)


def _same_dtype(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast, query, key and value in its dtype, as torch's own attention would cast them."""
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int | None,
    scale: float,
) -> torch.Tensor:
    """torch's varlen_attn; boundaries brought by a batch are on the device as int32 already."""
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = query.shape
    edges = boundaries.to(device=query.device, dtype=torch.int32)
    most = longest if longest is not None else T
    q, k, v = (tensor.transpose(1, 2).reshape(B * T, tensor.shape[1], -1) for tensor in (query, key, value))
    out = varlen_attn(
        q, k, v, edges, edges, most, most, scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1]
    )
    return cast("torch.Tensor", out).view(B, T, query.shape[1], -1)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: tuple[int, ...], scale: float, dropout: float
) -> torch.Tensor:
    """torch's flash kernel on one document after the other."""
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


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Short documents as blocks; if one is too long for that, all use the flash kernel."""
    plan = plan_groups(edges)
    if plan is None:
        return _one_by_one(query, key, value, edges, scale, 0.0)
    B, H, T, _ = query.shape
    flat = [_laid_end_to_end(tensor) for tensor in (query, key, value)]
    return attend_in_blocks(flat[0], flat[1], flat[2], plan, scale).view(B, T, H, -1)

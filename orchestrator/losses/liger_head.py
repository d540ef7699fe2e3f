"""Liger's fused linear cross-entropy (2410.10989) as a loss-head kernel, for summed log-probabilities. Knows no model.

K trained tokens, W hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.architecture.kernels import triton_interprets
from orchestrator.losses.chunked_head import Shape, Term
from orchestrator.losses.token_logprobs import IGNORED


def takes(terms: Sequence[Term], targets_K: torch.Tensor, shape: Shape) -> bool:
    """Whether the kernel supports the request on this device: a sum, of one product, at temperature 1, no entropies.

    Triton runs on GPUs, and elsewhere only where it interprets its kernels; Liger divides by the number of tokens.
    """
    return (
        shape.kernel == "liger"
        and shape.is_summed
        and not shape.entropies
        and shape.temperature == 1.0
        and len(terms) == 1
        and len(targets_K) > 0
        and (targets_K.is_cuda or triton_interprets())
    )


def summed_logprobs_K(
    term: Term, bias_V: torch.Tensor | None, targets_K: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """K numbers in fp32 whose *sum* is that of the targets' log-probabilities in nats: the first holds all of it.

    Weight and bias are used in the dtype of the hidden states; the gradient of a trained weight is summed in fp32, a
    frozen one gets none.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]  # needs a GPU
        LigerFusedLinearCrossEntropyLoss,
    )

    hidden_KW = term.hidden_KW
    weight_VW = term.weight_VW.to(hidden_KW.dtype)
    bias_V = None if bias_V is None else bias_V.to(hidden_KW.dtype)
    trains_head = weight_VW.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if trains_head and torch.is_grad_enabled() and not hidden_KW.requires_grad:
        # Liger makes the head's gradients only along with those of hidden states: a head trained alone would get none
        hidden_KW = hidden_KW.detach().requires_grad_()
    kernel = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED,
        reduction="sum",
        softcap=softcap,
        accum_dtype=torch.float32 if trains_head else None,
    )
    with torch.autocast(hidden_KW.device.type, enabled=False):
        loss = kernel(weight_VW, hidden_KW, targets_K, bias_V)
    return torch.cat([-loss.float().unsqueeze(0), loss.new_zeros(len(targets_K) - 1, dtype=torch.float32)])

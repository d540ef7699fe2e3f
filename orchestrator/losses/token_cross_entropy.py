"""Losses as pure functions of tensors. B rows, T positions, V vocabulary entries."""

from __future__ import annotations

import torch
from torch.nn import functional

from orchestrator.losses.token_logprobs import IGNORED


def token_cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(token t | tokens before t) over the trained tokens, in nats, as an fp32 scalar.

    logits_BTV at position t predict labels_BT at t + 1; labels of -100 are not trained. The caller divides by the
    number of trained tokens of the *global* batch, so that the gradient does not depend on how that batch is split.
    """
    targets_N = labels_BT[:, 1:].reshape(-1)
    trained_N = targets_N != IGNORED
    logits_NV = logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1])[trained_N].float()
    return functional.cross_entropy(logits_NV, targets_N[trained_N], reduction="sum")

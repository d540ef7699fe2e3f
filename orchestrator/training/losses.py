"""Losses as pure functions of tensors. B rows, T positions, V vocabulary entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from orchestrator.training.data.rows import Batch
from orchestrator.training.runtime import Runtime

IGNORED = -100

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""Sum of the losses of a micro-batch's trained tokens, in nats, as an fp32 scalar."""


def sft_loss(runtime: Runtime) -> Loss:
    """Summed next-token cross-entropy of a micro-batch, in the run's precision."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with runtime.forward_context():
            logits_BTV = model(**batch.model_inputs()).logits
        return token_cross_entropy_sum(logits_BTV, batch.labels_BT)

    return loss


def token_cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(token t | tokens before t) over the trained tokens, in nats, as an fp32 scalar.

    logits_BTV at position t predict labels_BT at t + 1; labels of -100 are not trained. The caller divides by the
    number of trained tokens of the *global* batch, so that the gradient does not depend on how that batch is split.
    """
    targets_N = labels_BT[:, 1:].reshape(-1)
    trained_N = targets_N != IGNORED
    logits_NV = logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1])[trained_N].float()
    return functional.cross_entropy(logits_NV, targets_N[trained_N], reduction="sum")

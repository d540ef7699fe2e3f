"""Log-probabilities and entropies of labelled tokens; knows tensors only: must not import the rest of the orchestrator.

B sequences, T positions, V vocabulary entries, K labelled tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

IGNORED = -100
"""Label of a position that is not a target."""

ENTROPY_ROWS = 512
"""Number of vocabulary-sized rows whose softmax is in memory at a time."""


def labelled_positions(labels_BT: torch.Tensor) -> torch.Tensor:
    """Positions `positions_K` of the labelled tokens in the flattened labels, without first positions.

    On a GPU this waits for the device: batches compute it before they are moved there.
    """
    labelled_BT = labels_BT != IGNORED
    labelled_BT[:, 0] = False
    return labelled_BT.flatten().nonzero().squeeze(1)


class TokenSpan(Protocol):
    """Tokens start..stop of sequence `sequence`, as `Span` in dataloader/batch.py has them."""

    @property
    def sequence(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


def token_logprobs_BT(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """log p(token t | tokens before t) in nats at position t; 0 where the label is -100, and at position 0.

    In at least fp32 for logits of any dtype; only their labelled rows are copied. The logits at t - 1 predict t,
    and are divided by the temperature at which the tokens were sampled.
    """
    labelled_BT, logits_KV = _labelled_rows(logits_BTV, labels_BT, temperature)
    logprobs_K = -functional.cross_entropy(logits_KV, labels_BT[labelled_BT], reduction="none")
    return logprobs_K.new_zeros(labels_BT.shape).masked_scatter(labelled_BT, logprobs_K)


@torch.no_grad()
def token_entropies_BT(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats of the distribution that token t was sampled from, at position t; 0 where `token_logprobs_BT` is.

    Carries no gradient.
    """
    labelled_BT, logits_KV = _labelled_rows(logits_BTV, labels_BT, temperature)
    parts = [torch.special.entr(part.softmax(-1)).sum(-1) for part in logits_KV.split(ENTROPY_ROWS)]
    entropies_K = torch.cat(parts)
    return entropies_K.new_zeros(labels_BT.shape).masked_scatter(labelled_BT, entropies_K)


def sums_by_document(values_BT: torch.Tensor, documents: Sequence[TokenSpan]) -> torch.Tensor:
    """values_D: the sum of each document's values. Part of the graph even if a batch has no document."""
    if not documents:
        return values_BT.reshape(-1)[:0]
    return torch.stack([values_BT[span.sequence, span.start : span.stop].sum() for span in documents])


def _labelled_rows(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the labelled tokens, and the rows of logits that predict them, in at least fp32."""
    assert temperature > 0, temperature
    labelled_BT = labels_BT != IGNORED
    labelled_BT[:, 0] = False
    logits_KV = logits_BTV[:, :-1][labelled_BT[:, 1:]]
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    return labelled_BT, logits_KV if temperature == 1.0 else logits_KV / temperature

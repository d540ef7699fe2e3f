"""The comparison of a trained and a merged model: not-a-number never counts as agreement."""

from __future__ import annotations

import math

import torch

from orchestrator.dataloader.batch import Batch, Span
from orchestrator.merging.adapter_merge import _compared  # pyright: ignore[reportPrivateUsage]  # the arithmetic alone

IDS_BT = torch.tensor([[1, 2, 3, 0]])


def batch() -> Batch:
    return Batch(
        input_ids_BT=IDS_BT,
        labels_BT=IDS_BT,
        positions_K=torch.arange(3),
        attention_mask_BT=None,
        position_ids_BT=None,
        boundaries=torch.tensor([0, 4], dtype=torch.int32),
        longest=4,
        documents=(Span(0, 0, 4),),
        values_D=torch.zeros(1),
        row_ids=((0,),),
        num_tokens=4,
        num_trained_tokens=3,
    )


def test_equal_logits_have_no_divergence_and_nan_stays_nan() -> None:
    logits_BTV = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    same = _compared("same", [logits_BTV], [logits_BTV], [batch()])
    assert (same.kl, same.agreement) == (0.0, 1.0)
    broken = _compared("broken", [logits_BTV], [torch.full_like(logits_BTV, math.nan)], [batch()])
    assert math.isnan(broken.kl) and not broken.kl <= 0.02

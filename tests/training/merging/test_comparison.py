"""The comparison of a trained and a merged model: not-a-number never counts as agreement."""

from __future__ import annotations

import math

import torch

from orchestrator.composition.compose import compose
from orchestrator.dataloader.batch import Batch, Span
from orchestrator.distributed.runtime import start_single_runtime
from orchestrator.merging.comparison import Way, compare

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


class Fixed(torch.nn.Module):
    """A model that always has these logits."""

    def __init__(self, logits_BTV: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits_BTV

    def forward(self, **_inputs: object) -> Fixed:
        return self


def compared(name: str, one_BTV: torch.Tensor, other_BTV: torch.Tensor) -> Way:
    runtime = start_single_runtime(compose(["+experiment=llama_lora", "model.dtype=float32"]), autocast=False)
    return compare(name, runtime, Fixed(one_BTV), Fixed(other_BTV), [batch()])


def test_equal_logits_have_no_divergence_and_nan_stays_nan() -> None:
    logits_BTV = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    same = compared("same", logits_BTV, logits_BTV)
    assert (same.kl, same.agreement) == (0.0, 1.0)
    broken = compared("broken", logits_BTV, torch.full_like(logits_BTV, math.nan))
    assert math.isnan(broken.kl) and not broken.kl <= 0.02

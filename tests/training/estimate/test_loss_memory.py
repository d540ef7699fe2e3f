"""What the loss takes, forward and backward, against the bytes of real tensors."""

from __future__ import annotations

import pytest
import torch

from orchestrator.architecture.loss_head_chunks import kept_bytes_per_token, temporary_bytes
from orchestrator.config.model import Architecture
from orchestrator.estimate.activations import MicroBatchShape, loss_bytes
from orchestrator.losses.chunked_head import Shape, Term, chunked_logprobs_K
from orchestrator.losses.token_cross_entropy import token_cross_entropy_sum
from orchestrator.losses.token_logprobs import IGNORED
from orchestrator.models.tracing.live_bytes import LiveBytes

VOCABULARY = 500


def model() -> Architecture:
    return Architecture(
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        num_experts=0,
        num_experts_per_token=0,
        attention_bias=False,
        feed_forward_bias=False,
        num_positions=0,
        sliding_window=None,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("every", [1, 2, 8])
def test_the_loss_takes_what_the_forecast_says(dtype: torch.dtype, rows: int, every: int) -> None:
    length = 1024 // rows
    ids_BT = torch.zeros(rows, length, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT[:, ::every] = 7
    hidden_BTH = torch.ones(rows, length, 8, dtype=dtype, requires_grad=True)
    head_HV = torch.ones(8, VOCABULARY, dtype=dtype)
    tracker = LiveBytes([hidden_BTH, head_HV, labels_BT])
    with tracker:
        loss = _terms(hidden_BTH, head_HV, labels_BT)
        forward, tracker.peak = tracker.peak, 0
        loss.backward()
    load = MicroBatchShape(
        rows=rows, length=length, trained_share=1 / every, logits="whole", is_packed=False, on_cpu=True
    )
    expected = loss_bytes(model(), load, dtype.itemsize)
    assert forward == pytest.approx(expected[0], rel=0.02)
    assert tracker.peak == pytest.approx(expected[1], rel=0.02)


def _terms(hidden_BTH: torch.Tensor, head_HV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """As an objective's terms: the logits are gone when it returns."""
    logits_BTV = hidden_BTH @ head_HV
    return token_cross_entropy_sum(logits_BTV, labels_BT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("rows", [40, 1200])
def test_the_chunked_head_takes_what_the_forecast_says(
    dtype: torch.dtype, softcap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen head: a chunk's products, a block's logits and probabilities, and the gradients that are kept."""
    monkeypatch.setattr("orchestrator.architecture.loss_head_chunks.CPU_CHUNK_BYTES", 4 * VOCABULARY * 300)
    monkeypatch.setattr("orchestrator.architecture.loss_head_chunks.CPU_BLOCK_BYTES", 4 * VOCABULARY * 100)
    hidden_KW = torch.ones(rows, 8, dtype=dtype, requires_grad=True)
    weight_VW = torch.ones(VOCABULARY, 8, dtype=dtype)
    targets_K = torch.zeros(rows, dtype=torch.int64)
    tracker = LiveBytes([hidden_KW, weight_VW, targets_K])
    with tracker:
        chunked_logprobs_K(
            [Term(hidden_KW=hidden_KW, weight_VW=weight_VW)], None, targets_K, Shape(softcap=softcap, is_summed=True)
        )
    chunk = temporary_bytes(
        VOCABULARY, "cpu", rows=min(rows, 300), compute_bytes=dtype.itemsize, is_capped=softcap is not None
    )
    assert tracker.peak == pytest.approx(chunk + rows * kept_bytes_per_token(8, dtype.itemsize), rel=0.05)

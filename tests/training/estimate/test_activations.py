"""The forecast's peaks against traces of transformers' own modules at real widths; `-s` prints the table of docs/memory.md."""

from __future__ import annotations

from functools import cache
from statistics import median
from typing import cast

import pytest
import torch
from torch.nn import functional

from orchestrator.composition.compose import compose
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.tuning import LoraTuning
from orchestrator.estimate.activations import MicroBatchShape, activation_memory, mode_of
from orchestrator.models.tracing.live_bytes import Precision, trace
from orchestrator.models.tracing.untrained_models import Mode, build_model

LENGTHS = (512, 2048, 8192)
TUNINGS = ("full", "lora")
MIB = 2**20


def facts(
    family: str, vocabulary: int, hidden: int, inner: int, heads: tuple[int, int, int], **more: object
) -> Architecture:
    """Four layers of a real width."""
    known: dict[str, object] = {
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "num_experts": 0,
        "num_experts_per_token": 0,
        "attention_bias": False,
        "feed_forward_bias": False,
        "num_positions": 0,
        "sliding_window": None,
    }
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner}
    attention = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    return Architecture.model_validate({"model_type": family, **sizes, **attention, **known, **more})


MODELS = {
    "Llama-3.1-8B": (facts("llama", 128256, 4096, 14336, (32, 8, 128)), "none"),
    "Qwen3-8B": (facts("qwen3", 151936, 4096, 12288, (32, 8, 128)), "zero3"),
    "Gemma-2B": (facts("gemma", 256000, 2048, 16384, (8, 1, 256), tie_word_embeddings=True), "none"),
    "Pythia-6.9B": (facts("gpt_neox", 50432, 4096, 16384, (32, 32, 128)), "none"),
    "Mixtral-8x7B": (
        facts("mixtral", 32000, 4096, 14336, (32, 8, 128), num_experts=8, num_experts_per_token=2),
        "zero2",
    ),
}


@cache
def settings(tuning: str, sharding: str, checkpointing: bool) -> RunConfig:
    words = (
        "model.dtype=bfloat16",
        f"sharding={sharding}",
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
    )
    return compose([f"+experiment=llama_{tuning}", *words])


def whole_loss(logits_BTV: torch.Tensor) -> torch.Tensor:
    """`token_cross_entropy_sum` with every token trained; the places are given, as a trace has no numbers to find them."""
    logits_NV = logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1])
    places_N = torch.zeros(logits_NV.shape[0], dtype=torch.int64)
    return functional.cross_entropy(logits_NV[places_N].float(), places_N, reduction="sum")


def error_of(model: Architecture, config: RunConfig, length: int) -> tuple[float, float]:
    """(traced, forecast) peak bytes of a micro-batch."""
    load = MicroBatchShape(rows=1, length=length, trained_share=1.0, logits="whole", is_packed=False, on_cpu=False)
    precision = cast("Precision", mode_of(model, config, load).split("/")[1])
    mode = Mode(
        precision=precision,
        checkpoint_every=config.model.checkpoint_every if config.model.gradient_checkpointing else 0,
        attention="sdpa",
        lora=config.tuning if isinstance(config.tuning, LoraTuning) else None,
    )
    traced = trace(lambda: build_model(model, mode), rows=1, length=length, precision=precision, loss=whole_loss)
    peaks = activation_memory(model, config, load)
    return traced.peak, max(peaks.forward, peaks.backward, peaks.bottom)


def test_peaks_are_those_of_the_real_modules() -> None:
    errors: list[float] = []
    for name, (model, sharding) in MODELS.items():
        for tuning in TUNINGS:
            for checkpointing in (False, True):
                config = settings(tuning, sharding, checkpointing)
                cells = [error_of(model, config, length) for length in LENGTHS]
                errors += [forecast / traced - 1 for traced, forecast in cells]
                told = " | ".join(f"{traced / MIB:,.0f} / {forecast / MIB:,.0f}" for traced, forecast in cells)
                print(f"| {name} | {tuning} | {'on' if checkpointing else 'off'} | {told} |")
    sizes = [abs(error) for error in errors]
    print(f"{len(sizes)} cases: median error {median(sizes):.2%}, worst {max(sizes):.2%}")
    assert len(sizes) == 5 * 2 * 2 * 3
    assert median(sizes) <= 0.05
    assert max(sizes) <= 0.10


@pytest.mark.parametrize("every", [2, 5])
def test_some_layers_recomputed_are_between_all_and_none(every: int) -> None:
    model = facts("llama", 32000, 1024, 2816, (16, 4, 64))
    words = ("model.dtype=bfloat16", "model.gradient_checkpointing=true", f"model.checkpoint_every={every}")
    config = compose(["+experiment=llama_lora", *words])
    traced, forecast = error_of(model, config, 2048)
    assert abs(forecast / traced - 1) <= 0.05
    whole, _ = error_of(model, settings("lora", "none", True), 2048)
    none, _ = error_of(model, settings("lora", "none", False), 2048)
    assert whole < traced < none


def test_two_trackers_see_the_same_peak() -> None:
    """torch's MemTracker, which knows nothing of ours."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from orchestrator.models.tracing import live_bytes as memory_trace

    model = facts("llama", 32000, 1024, 2816, (16, 4, 64))
    mode = Mode(precision="bfloat16", checkpoint_every=0, attention="sdpa", lora=None)
    ours = trace(lambda: build_model(model, mode), rows=1, length=1024, precision="bfloat16").peak
    with torch.device("meta"):
        module = build_model(model, mode).train()
    with FakeTensorMode():
        memory_trace._materialise(module)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(memory_trace._forget)
        tracker = MemTracker()
        tracker.track_external(module)
        with tracker:
            logits = module(input_ids=torch.zeros(1, 1024, dtype=torch.int64), use_cache=False).logits
            value = memory_trace._Consume.apply(logits)
            del logits
            value.backward()
        (whole,) = tracker.get_tracker_snapshot("peak").values()
    held = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    assert whole["Total"] - held == pytest.approx(ours, rel=0.01)

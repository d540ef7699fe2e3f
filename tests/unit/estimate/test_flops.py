"""FLOPs of a token, useful and executed, against hand arithmetic for Llama-3.1-8B."""

from __future__ import annotations

import pytest
import yaml

from orchestrator.composition.compose import CONF, compose
from orchestrator.config.model import Architecture
from orchestrator.estimate.flops import (
    attention_flops,
    executed_flops_per_token,
    flops_per_token,
    forward_flops_per_token,
    matrices_of,
)

LAYERS, HEAD, ADAPTER = 32 * 218_112_000, 525_336_576, 41_943_040
ATTENTION = 2 * 4096 * 32 * 128 * 32
MEASURED_PEAK = 790e12
"""FLOP/s of bf16 matrices on an H200."""


def llama() -> Architecture:
    return Architecture.model_validate(
        yaml.safe_load((CONF / "model" / "llama3_8b.yaml").read_text())["preset"]["architecture"]
    )


def test_the_matrices_of_llama() -> None:
    counted = matrices_of(llama())
    norm = 4096
    assert (counted.layers, counted.head) == (LAYERS + norm, HEAD)
    assert counted.layers == pytest.approx(6.979e9, rel=1e-3) and counted.head == pytest.approx(0.525e9, rel=1e-3)
    assert attention_flops(llama(), length=4096) == ATTENTION


@pytest.mark.parametrize(
    ("words", "useful", "executed"),
    [
        (("+experiment=llama_full",), 6 * (LAYERS + HEAD) + 3 * ATTENTION, None),
        (
            ("+experiment=llama_full", "model.gradient_checkpointing=true"),
            6 * (LAYERS + HEAD) + 3 * ATTENTION,
            8 * LAYERS + 6 * HEAD + 4 * ATTENTION,
        ),
        (
            ("+experiment=llama_full", "model.gradient_checkpointing=true", "model.checkpoint_every=4"),
            6 * (LAYERS + HEAD) + 3 * ATTENTION,
            6 * (LAYERS + HEAD) + 3 * ATTENTION + (2 * LAYERS + ATTENTION) / 4,
        ),
        (("+experiment=llama_lora",), 4 * (LAYERS + HEAD) + 3 * ATTENTION + 6 * ADAPTER, None),
        (
            ("+experiment=llama_lora", "model.gradient_checkpointing=true"),
            4 * (LAYERS + HEAD) + 3 * ATTENTION + 6 * ADAPTER,
            6 * LAYERS + 4 * HEAD + 4 * ATTENTION + 8 * ADAPTER,
        ),
    ],
)
def test_useful_and_executed_by_hand(words: tuple[str, ...], useful: int, executed: float | None) -> None:
    config = compose(list(words))
    assert flops_per_token(llama(), config, length=4096) == pytest.approx(useful, rel=1e-5)
    assert executed_flops_per_token(llama(), config, length=4096) == pytest.approx(executed or useful, rel=1e-5)


def test_limits_of_one_h200() -> None:
    """23.6k tokens a second for LoRA without checkpointing at 4096 tokens, 12.5k for full with it."""
    lora = compose(["+experiment=llama_lora"])
    assert MEASURED_PEAK / executed_flops_per_token(llama(), lora, length=4096) == pytest.approx(23_600, rel=0.01)
    full = compose(["+experiment=llama_full", "model.gradient_checkpointing=true"])
    assert MEASURED_PEAK / executed_flops_per_token(llama(), full, length=4096) == pytest.approx(12_500, rel=0.04)


def test_checkpointing_costs_full_a_third_and_lora_a_half() -> None:
    for experiment, extra in (("llama_full", 1 / 3), ("llama_lora", 1 / 2)):
        plain = compose([f"+experiment={experiment}"])
        again = compose([f"+experiment={experiment}", "model.gradient_checkpointing=true"])
        ratio = executed_flops_per_token(llama(), again, length=512) / executed_flops_per_token(
            llama(), plain, length=512
        )
        assert ratio == pytest.approx(1 + extra, abs=0.04)


def test_a_token_that_is_only_scored() -> None:
    config = compose(["+experiment=llama_lora"])
    expected = 2 * (LAYERS + HEAD + ADAPTER) + ATTENTION
    assert forward_flops_per_token(llama(), config, length=4096) == pytest.approx(expected, rel=1e-5)

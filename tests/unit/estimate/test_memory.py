"""The memory forecast by hand arithmetic: coefficients, KV cache, phases, verdicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from presets import preset

from orchestrator.architecture.families import FAMILIES
from orchestrator.composition.compose import compose
from orchestrator.estimate.activation_polynomials import FOLDER, moments_of, traced
from orchestrator.estimate.activations import (
    MicroBatchShape,
    activation_memory,
    attention_path,
    chunked_head_bytes,
    loss_bytes,
)
from orchestrator.estimate.constants import GIB
from orchestrator.estimate.generation_memory import kv_cache_bytes
from orchestrator.estimate.memory import Loss, memory_forecast
from orchestrator.estimate.memory_records import MemoryForecast, PhaseForecast, verdict_of
from orchestrator.estimate.sharding_buffers import (
    bucket_bytes,
    gathered_bytes,
    persistent_bytes,
    secondary_bytes,
    step_bytes,
)

ROW = MicroBatchShape(rows=1, length=4096, trained_share=1.0, logits="whole", is_packed=False, on_cpu=False)
EIGHT = ("model.dtype=bfloat16", "launcher=torchrun", "cluster.processes_per_node=8", "stages.sft.batch.global_size=64")


def forecast(
    *words: str, experiment: str = "llama3_8b_lora", model: str = "llama3_8b", loss: Loss | None = None
) -> MemoryForecast:
    config = compose([f"+experiment={experiment}", *words])
    return memory_forecast(preset(model), config, config.stages["sft"], loss=loss)


def phase(told: MemoryForecast, name: str) -> PhaseForecast:
    return next(one for one in told.phases if one.name == name)


# ---- coefficients --------------------------------------------------------------------------------


def test_every_family_was_traced() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(FAMILIES)
    ways = list(
        product(
            ("full", "lora"),
            ("autocast", "bfloat16", "adapters32", "float32"),
            ("sdpa", "masked", "eager"),
            ("kept", "checkpointed"),
        )
    )
    known = {family: len(traced(family).modes) for family in FAMILIES}
    assert known["llama"] == len(ways) - 6 == 42  # adapters32 is LoRA's alone
    for family in FAMILIES:
        for way in ways:
            moments = moments_of(preset("llama3_8b").model_copy(update={"model_type": family}), "/".join(way))
            assert all(moments.__dict__.values()), (family, way)


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    """2 s b h bytes a layer (2205.05198, section 5)."""
    for family in ("llama", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox"):
        kept = traced(family).tables[traced(family).modes["full/bfloat16/sdpa/checkpointed"]].kept
        slopes = {name: slope for name, (_, slope) in kept.items() if slope}
        assert slopes in ({"N.h": 2.0}, {"N.q": 2.0}), family


def test_what_a_llama_layer_keeps_in_sixteen_bits() -> None:
    """By hand, bytes a token: norms 2 x (2 h input + 4 h in fp32 + 4 + 2 h normalised) and what each product needs."""
    kept = traced("llama").tables[traced("llama").modes["full/bfloat16/sdpa/kept"]].kept
    slopes = {name: slope for name, (_, slope) in kept.items() if slope}
    assert slopes["N.f"] == 4 * 2  # gate, up, silu(gate), their product
    assert "h.q" not in slopes and "f.h" not in slopes  # weights are not kept a second time
    assert 41 <= _per_hidden(slopes) <= 52  # 41 s b h is a usual figure; transformers' norms and rotations keep more


def _per_hidden(slopes: dict[str, float]) -> float:
    model = preset("llama3_8b")
    sizes = {"h": model.hidden_size, "f": model.intermediate_size, "D": 128, "H": 32, "K": 8, "q": 4096, "k": 1024}
    total = 0.0
    for name, slope in slopes.items():
        value = slope
        for part in name.split(".")[1:] if name.startswith("N") else name.split("."):
            value *= sizes[part] if part != "N" else 1
        total += value
    return total / model.hidden_size


def test_dense_masks_and_scores_grow_with_the_square() -> None:
    model = preset("llama3_8b")
    config = compose(["+experiment=llama3_8b_lora", "model.gradient_checkpointing=false"])
    eager = compose(["+experiment=llama3_8b_lora", "model.gradient_checkpointing=false", "model.attention=eager"])
    fused, scores = (activation_memory(model, one, ROW).kept for one in (config, eager))
    assert scores - fused > 32 * 32 * 4096 * 4096 * 2  # layers x heads x T x T in 16 bits, at least


@pytest.mark.parametrize(
    ("words", "window", "packed", "path"),
    [
        ((), None, False, "sdpa"),
        ((), None, True, "sdpa"),
        (("model.attention=sdpa",), None, True, "masked"),
        ((), 1024, False, "masked"),
        ((), 4096, False, "sdpa"),
        (("model.attention=flash_attention_2",), 1024, True, "sdpa"),
        (("model.attention=eager",), None, False, "eager"),
    ],
)
def test_the_path_of_attention(words: tuple[str, ...], window: int | None, packed: bool, path: str) -> None:
    model = preset("llama3_8b").model_copy(update={"sliding_window": window})
    load = MicroBatchShape(rows=1, length=4096, trained_share=1.0, logits="whole", is_packed=packed, on_cpu=False)
    assert attention_path(model, compose(["+experiment=llama3_8b_lora", *words]), load) == path


def test_logits_by_hand() -> None:
    """4096 x 128256: 2 bytes of logits, then log-softmax and two gradients of 4 bytes each."""
    forward, backward = loss_bytes(preset("llama3_8b"), ROW, 2)
    assert forward == 4096 * 128256 * (2 + 4 + 4)
    assert backward == 4096 * 128256 * 12


def test_the_chunked_head_by_hand() -> None:
    """4096 tokens of Llama-3.1-8B on a GPU: 256 MiB of fp32 logits are 523 rows; a hidden state and a target stay for each token."""
    model, row = preset("llama3_8b"), replace(ROW, logits="chunked")
    rows = 256 * 2**20 // (4 * 128256)
    frozen = chunked_head_bytes(model, compose(["+experiment=llama3_8b_lora"]), row)
    assert frozen.kept == 4096 * (4096 * 2 + 8)
    assert frozen.forward == (2 + 4 + 4) * rows * 128256 and frozen.backward == 0, "products, logits and probabilities"
    trained = chunked_head_bytes(model, compose(["+experiment=llama3_8b_lora", "tuning=full"]), row)
    rows = max(rows, 4096 // 4)
    assert trained.forward == (2 + 4 + 4) * rows * 128256 + 2 * 128256 * 4096
    assert trained.backward == trained.forward + 128256 * 4096 * (4 + 2)


# ---- generation ----------------------------------------------------------------------------------


def test_the_cache_of_grouped_queries() -> None:
    """Llama-3.1-8B: 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token, so 8192 tokens take 1 GiB."""
    assert kv_cache_bytes(preset("llama3_8b"), sequences=1, length=8192, width=2) == GIB
    assert kv_cache_bytes(preset("llama3_70b"), sequences=4, length=1000, width=2) == 4 * 1000 * 2 * 80 * 8 * 128 * 2


def test_a_policy_stage_generates_and_keeps_its_judges() -> None:
    config = compose(["+experiment=llama3_8b_rlhf"])
    name = next(name for name in config.pipeline if config.stages[name].kind == "grpo")
    told = memory_forecast(preset("llama3_8b"), config, config.stages[name])
    assert "rollout" in [one.name for one in told.phases]
    assert phase(told, "rollout").device["KV cache"] > 0
    judges = [one for one in told.phases if "other models" in one.device]
    assert len(judges) >= 4


# ---- sharding ------------------------------------------------------------------------------------


def test_buffers_of_ddp_and_zero() -> None:
    model = preset("llama3_8b")
    ddp = compose(["+experiment=llama_full", *EIGHT])
    assert bucket_bytes(model, ddp) == 4 * 8_030_261_248
    zero2 = compose(["+experiment=llama_full", *EIGHT, "sharding=zero2"])
    assert bucket_bytes(model, zero2) == 2 * 2 * 200_000_000  # a layer has 218 M: the most
    assert step_bytes(model, zero2) == 4 * 8_030_261_248 / 8
    assert gathered_bytes(model, zero2) == persistent_bytes(model, zero2) == 0
    zero3 = compose(["+experiment=llama_full", *EIGHT, "sharding=zero3"])
    largest = 128256 * 4096
    assert gathered_bytes(model, zero3) == 2 * (1_200_000_000 + largest)
    assert gathered_bytes(model, zero3, least=True) == 2 * 2 * largest


def test_zero_plus_keeps_a_second_copy_of_the_shards_within_a_node() -> None:
    plain = compose(["+experiment=llama_full", *EIGHT, "sharding=zero3"])
    within = compose(["+experiment=llama_full", *EIGHT, "sharding=zero3", "sharding.hpz_partition_size=4"])
    model = preset("llama3_8b")
    assert secondary_bytes(model, plain) == 0
    assert secondary_bytes(model, within) == 2 * 8_030_261_248 / 4


def test_offload_moves_states_to_the_host() -> None:
    told = forecast(*EIGHT, "sharding=zero3_offload", "tuning=full")
    assert told.total == 0
    step = phase(told, "optimizer step")
    assert step.host["optimizer"] == pytest.approx(12 * 8_030_261_248 / 8 / GIB)
    assert step.host["weights"] == pytest.approx(2 * 8_030_261_248 / 8 / GIB)


# ---- the forecast --------------------------------------------------------------------------------


def test_estimates_stand_in_order_everywhere() -> None:
    cases = 0
    for tuning, sharding, checkpointing in product(
        ("full", "lora"), ("none", "zero1", "zero2", "zero3", "zero3_offload"), (True, False)
    ):
        told = forecast(
            f"tuning={tuning}",
            f"sharding={sharding}",
            f"model.gradient_checkpointing={str(checkpointing).lower()}",
            *EIGHT,
        )
        assert all(one.low <= one.expected <= one.high for one in told.phases)
        assert told.binding in [one.name for one in told.phases]
        assert all(sum(one.device.values()) == pytest.approx(one.expected) for one in told.phases)
        cases += 1
    assert cases == 20


def test_what_saves_memory_saves_it() -> None:
    words = ("model.gradient_checkpointing=false", "stages.sft.batch.micro_size=1")
    plain = forecast(*words, loss=Loss(logits="whole"))
    assert forecast("model.gradient_checkpointing=true").expected < plain.expected
    assert forecast(*words, "quantization=nf4").weights < plain.weights
    assert forecast(*words, loss=Loss(logits="chunked")).expected < plain.expected
    assert forecast(*words, "stages.sft.data.max_length=512").expected < plain.expected


@pytest.mark.parametrize(
    ("low", "high", "memory", "verdict"),
    [(10, 20, 20, "FIT"), (10, 20, 19.9, "TIGHT"), (10, 20, 10, "TIGHT"), (10, 20, 9.9, "NO"), (10, 20, None, None)],
)
def test_verdicts(low: float, high: float, memory: float | None, verdict: str | None) -> None:
    assert verdict_of(low, high, memory) == verdict


def test_full_fine_tuning_of_eight_billion_does_not_fit_and_lora_does() -> None:
    config = compose(["+experiment=llama3_8b_lora", "tuning=full"])
    model = preset("llama3_8b")
    assert memory_forecast(model, config, config.stages["sft"], memory_gib=80).verdict == "NO"
    thrifty = compose(
        [
            "+experiment=llama3_8b_lora",
            "model.gradient_checkpointing=true",
            "stages.sft.batch.micro_size=1",
            "stages.sft.data.max_length=2048",
        ]
    )
    assert memory_forecast(model, thrifty, thrifty.stages["sft"], memory_gib=80).verdict == "FIT"


def test_a_rank_on_a_processor_counts_its_own_process() -> None:
    here, gpu = (phase(forecast(f"cluster.device={device}"), "load").device for device in ("cpu", "cuda"))
    assert here["process"] == pytest.approx(0.5) and "context" not in here and "process" not in gpu

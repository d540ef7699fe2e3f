"""Parameters, bytes and FLOPs against published numbers and counts by hand."""

from __future__ import annotations

from functools import cache

import pytest
import yaml
from presets import preset

from orchestrator.architecture.adapter_parameters import adapter_problems, count_lora_parameters
from orchestrator.architecture.deepspeed import deepspeed_dict
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.architecture.zero_buckets import with_zero_buckets
from orchestrator.composition.compose import CONF, compose
from orchestrator.config.run import RunConfig
from orchestrator.config.sharding import ZeroSharding
from orchestrator.config.tuning import LoraTuning
from orchestrator.estimate.flops import flops_per_token
from orchestrator.estimate.model_states import NF4_BYTES, StateMemory, state_memory

PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "mixtral_8x7b": 46_702_792_704,
}
ON_64 = ("launcher=torchrun", "cluster.nodes=8", "cluster.processes_per_node=8", "stages.sft.batch.global_size=256")


def lora(**changes: object) -> LoraTuning:
    return LoraTuning.model_validate({**yaml.safe_load((CONF / "tuning" / "lora.yaml").read_text()), **changes})


def test_every_preset_has_the_published_number_of_parameters() -> None:
    assert sorted(PUBLISHED) == sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
    assert {name: count_parameters(preset(name)).total for name in PUBLISHED} == PUBLISHED


def test_a_token_meets_two_of_eight_experts() -> None:
    counts = count_parameters(preset("mixtral_8x7b"))
    assert counts.active == counts.total - 32 * 6 * 3 * 4096 * 14336 == 12_879_925_248
    dense = count_parameters(preset("llama3_8b"))
    assert dense.active == dense.total


def test_lora_counts_by_hand() -> None:
    llama = preset("llama3_8b")
    attention = 4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096
    feed_forward = 3 * (4096 + 14336)
    assert count_lora_parameters(llama, lora(rank=16)) == 32 * 16 * (attention + feed_forward) == 41_943_040
    assert (
        count_lora_parameters(llama, lora(rank=8, target_modules=["q_proj", "v_proj"]))
        == 32 * 8 * (8192 + 5120)
        == 3_407_872
    )
    magnitudes = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert count_lora_parameters(llama, lora(rank=16, use_dora=True)) == 41_943_040 + magnitudes


def test_lora_counts_of_a_mixture_by_hand() -> None:
    mixtral = preset("mixtral_8x7b")
    attention = 4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096
    experts = 8 * (2 * (4096 + 2 * 14336) + (14336 + 4096))
    assert count_lora_parameters(mixtral, lora(rank=16)) == 32 * 16 * (attention + 4096 + 8 + experts)
    by_name = lora(rank=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert count_lora_parameters(mixtral, by_name) == 32 * 16 * attention == 13_631_488
    recipe = compose(["+experiment=mixtral_8x7b_lora_zero3"])
    assert recipe.tuning == by_name


def test_what_peft_cannot_do_with_a_mixture_is_refused_before_the_job() -> None:
    told = adapter_problems(preset("mixtral_8x7b"), lora(use_dora=True, dropout=0.1))
    assert [line.split(":")[0] for line in told] == ["tuning.use_dora=true", "tuning.dropout=0.1"]
    assert adapter_problems(preset("mixtral_8x7b"), lora(use_dora=True, target_modules=["q_proj"])) == []
    assert adapter_problems(preset("llama3_8b"), lora(use_dora=True, dropout=0.1)) == []


# ---- ZeRO (1910.02054): the example of section 1 and figure 1, 7.5 B parameters on 64 GPUs, Adam in mixed precision -------------


@cache
def states_of(words: tuple[str, ...]) -> tuple[StateMemory, float, RunConfig]:
    """States of Llama-3.1-8B, and what scales them to the 7.5 B of the paper."""
    config = compose(["+experiment=llama_full", "model.dtype=bfloat16", *ON_64, *words])
    model = preset("llama3_8b")
    return state_memory(model, config, config.stages["sft"]), 7.5 / count_parameters(model).total, config


@pytest.mark.parametrize(
    ("sharding", "gigabytes"), [("none", 120.0), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.875)]
)
def test_the_papers_example(sharding: str, gigabytes: float) -> None:
    states, scale, config = states_of((f"sharding={sharding}",))
    assert config.world_size == 64
    assert states.total * scale == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("words", "weights", "gradients", "optimizer"),
    [
        (("sharding=none",), 4, 4, 8),
        (("sharding=zero1",), 2, 2, 12 / 64),
        (("sharding=zero2",), 2, 2 / 64, 12 / 64),
        (("sharding=zero3",), 2 / 64, 2 / 64, 12 / 64),
        (("sharding=zero3_offload",), 0, 0, 0),
        (("sharding=zero2", "sharding.offload_optimizer=cpu"), 2, 0, 0),
        (("sharding=zero2", "model.dtype=float32"), 4, 4 / 64, 12 / 64),
        (("sharding=zero3", "optimizer@stages.sft.optimizer=adamw_8bit"), 2 / 64, 2 / 64, (4 + 2 * (1 + 4 / 256)) / 64),
    ],
)
def test_bytes_of_a_parameter(words: tuple[str, ...], weights: float, gradients: float, optimizer: float) -> None:
    states, scale, _ = states_of(words)
    per_parameter = [part * scale / 7.5 for part in (states.weights, states.gradients, states.optimizer)]
    assert per_parameter == pytest.approx([weights, gradients, optimizer])


def test_an_adapter_has_gradients_and_states_of_its_own_alone() -> None:
    model, trained = preset("llama3_8b"), 41_943_040
    config = compose(["+experiment=llama3_8b_lora"])
    states = state_memory(model, config, config.stages["sft"])
    assert states.weights == 2 * 8_030_261_248 + 4 * trained
    assert (states.gradients, states.optimizer) == (4 * trained, 8 * trained)


def test_four_bits_hold_the_linear_layers_and_not_the_embeddings() -> None:
    model, embeddings = preset("llama3_8b"), 2 * 128256 * 4096
    config = compose(["+experiment=llama3_8b_lora", "quantization=nf4"])
    states = state_memory(model, config, config.stages["sft"])
    norms = 32 * 2 * 4096 + 4096
    linear = 8_030_261_248 - embeddings - norms
    tables = 32 * 7 * (64 + 1024 + 4)
    assert states.weights == pytest.approx(2 * (embeddings + norms) + NF4_BYTES * linear + tables + 4 * 41_943_040)
    assert pytest.approx(4.127, abs=5e-4) == 8 * NF4_BYTES


# ---- FLOPs ---------------------------------------------------------------------------------------


def test_useful_flops_are_six_per_matrix_parameter_and_token() -> None:
    model = preset("llama3_8b")
    matrices = 8_030_261_248 - 128256 * 4096
    attention = 3 * 2 * 4096 * 32 * 128 * 32
    full = compose(["+experiment=llama_full", "model.dtype=bfloat16"])
    assert flops_per_token(model, full, length=4096) == 6 * matrices + attention
    adapter = compose(["+experiment=llama_lora", "model.dtype=bfloat16"])
    assert flops_per_token(model, adapter, length=4096) == 4 * matrices + attention + 6 * 41_943_040


def test_a_tied_head_is_counted_and_idle_experts_are_not() -> None:
    config = compose(["+experiment=llama_full", "model.dtype=bfloat16"])
    tied = flops_per_token(preset("smollm2_135m"), config, length=1)
    assert tied == 6 * 134_515_008 + 3 * 2 * 9 * 64 * 30
    mixture = flops_per_token(preset("mixtral_8x7b"), config, length=1)
    assert mixture == 6 * (12_879_925_248 - 32000 * 4096) + 3 * 2 * 32 * 128 * 32


# ---- the DeepSpeed dict --------------------------------------------------------------------------


def test_the_dict_says_what_the_configuration_says() -> None:
    words = (
        "sharding=zero3_offload",
        "sharding.bucket_elements=11",
        "sharding.prefetch_elements=12",
        "sharding.persistence_elements=13",
    )
    batch = ("stages.sft.batch.micro_size=2", "stages.sft.optimizer.max_grad_norm=0.5")
    config = compose(["+experiment=llama_full", "model.dtype=bfloat16", *ON_64, *words, *batch])
    assert deepspeed_dict(config, config.stages["sft"]) == {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 11,
            "allgather_bucket_size": 11,
            "stage3_prefetch_bucket_size": 12,
            "stage3_param_persistence_threshold": 13,
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }


@pytest.mark.parametrize(("sharding", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_the_dict_of_a_stage_and_of_fp32(sharding: str, stage: int) -> None:
    config = compose(
        [
            "+experiment=llama_lora",
            f"sharding={sharding}",
            "model.dtype=float32",
            "stages.sft.optimizer.max_grad_norm=null",
        ]
    )
    rendered = deepspeed_dict(config, config.stages["sft"])
    assert rendered is not None
    section = rendered["zero_optimization"]
    assert isinstance(section, dict) and section["stage"] == stage
    assert ("stage3_prefetch_bucket_size" in section) == (stage == 3) and "offload_optimizer" not in section
    assert rendered["bf16"] == {"enabled": False} and rendered["gradient_clipping"] == 0.0


def test_buckets_are_of_the_models_shape_where_nothing_is_said() -> None:
    config = compose(["+experiment=llama_full", "model.dtype=bfloat16", "sharding=zero3"])
    small, large = (with_zero_buckets(config, preset(name)).sharding for name in ("smollm2_135m", "llama3_70b"))
    assert isinstance(small, ZeroSharding) and isinstance(large, ZeroSharding)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert (small.bucket_elements, small.prefetch_elements, small.persistence_elements) == (layer, layer, 100_000)
    assert (large.bucket_elements, large.prefetch_elements) == (200_000_000, 200_000_000)
    said = compose(["+experiment=llama_full", "model.dtype=bfloat16", "sharding=zero3", "sharding.bucket_elements=7"])
    kept = with_zero_buckets(said, preset("llama3_70b")).sharding
    assert isinstance(kept, ZeroSharding) and kept.bucket_elements == 7
    assert (
        with_zero_buckets(compose(["+experiment=llama_full", "model.dtype=bfloat16"]), None).sharding.strategy == "none"
    )


def test_zero_plus_is_told_to_deepspeed() -> None:
    words = ("sharding.hpz_partition_size=8", "sharding.quantized_weights=true", "sharding.quantized_gradients=true")
    config = compose(["+experiment=llama_full", "model.dtype=bfloat16", *ON_64, "sharding=zero3", *words])
    rendered = deepspeed_dict(config, config.stages["sft"])
    assert rendered is not None and isinstance(section := rendered["zero_optimization"], dict)
    assert section["zero_hpz_partition_size"] == 8
    assert section["zero_quantized_weights"] and section["zero_quantized_gradients"]


def test_no_dict_without_deepspeed() -> None:
    config = compose(["+experiment=llama_lora", "model.dtype=bfloat16"])
    assert deepspeed_dict(config, config.stages["sft"]) is None

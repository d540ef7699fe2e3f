"""Renders the DeepSpeed dict from the configuration, its only source. Must not import torch or deepspeed."""

from __future__ import annotations

from orchestrator.architecture.zero_buckets import sizes_of
from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig, accumulation_steps
from orchestrator.config.sharding import ZeroSharding
from orchestrator.config.training import TrainingStage

NEVER = 1_000_000_000


def deepspeed_dict(config: RunConfig, stage: TrainingStage) -> dict[str, JsonValue] | None:
    """The DeepSpeed dict of a stage; None if the sharding is not DeepSpeed's."""
    if not isinstance(config.sharding, ZeroSharding):
        return None
    return {
        "train_batch_size": stage.batch.global_size,
        "train_micro_batch_size_per_gpu": stage.batch.micro_size,
        "gradient_accumulation_steps": accumulation_steps(config, stage),
        # DeepSpeed updates inside its backward pass, so the loop cannot clip: it only reads the norm.
        "gradient_clipping": stage.optimizer.max_grad_norm or 0.0,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": _zero_section(config.sharding),
        "zero_allow_untested_optimizer": True,  # 8-bit AdamW; plain AdamW is on DeepSpeed's list
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also steps on the host, without needing a compiler
        "steps_per_print": NEVER,
    }


def scoring_dict(config: RunConfig) -> dict[str, JsonValue] | None:
    """The DeepSpeed dict of ranks that train nothing; None where no sharding of parameters is configured."""
    sharding = config.sharding
    if not isinstance(sharding, ZeroSharding) or not sharding.shards_parameters:
        return None
    zero = _zero_section(sharding)
    trained = ("offload_optimizer", "zero_quantized_gradients", "stage3_gather_16bit_weights_on_model_save")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": {key: value for key, value in zero.items() if key not in trained},
        "steps_per_print": NEVER,
    }


def _zero_section(sharding: ZeroSharding) -> dict[str, JsonValue]:
    sizes = sizes_of(sharding, None)  # settled by the plan
    section: dict[str, JsonValue] = {
        "stage": sharding.stage,
        "overlap_comm": sharding.overlap_communication,
        "contiguous_gradients": True,
        "reduce_bucket_size": sizes.bucket,
        "allgather_bucket_size": sizes.bucket,
    }
    if sharding.shards_parameters:
        section |= {
            "stage3_prefetch_bucket_size": sizes.prefetch,
            "stage3_param_persistence_threshold": sizes.persistence,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if sharding.hpz_partition_size is not None:
            section["zero_hpz_partition_size"] = sharding.hpz_partition_size
        if sharding.quantized_weights:
            section["zero_quantized_weights"] = True
        if sharding.quantized_gradients:
            section["zero_quantized_gradients"] = True
    if sharding.offloads_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if sharding.offloads_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": True}
    return section

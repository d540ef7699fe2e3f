"""Memory of DeepSpeed and DDP besides the states: buckets, gathered parameters, small unsharded ones.

Must not import torch.
"""

from __future__ import annotations

from orchestrator.architecture.adapter_parameters import low_rank
from orchestrator.architecture.families import linear_layers
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.architecture.zero_buckets import sizes_of
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.sharding import ZeroSharding
from orchestrator.estimate.activations import layer_parameters
from orchestrator.estimate.constants import LIVE_ELEMENTS, SUB_GROUP_ELEMENTS
from orchestrator.estimate.model_states import (
    adapter_width,
    base_bytes,
    compute_width,
    shards_of,
    trainable_parameters,
    trained_width,
)


def bucket_bytes(model: Architecture, config: RunConfig) -> float:
    """Flat buffers in which gradients travel; DDP's hold all of them (accelerate leaves gradient_as_bucket_view off)."""
    trained = trainable_parameters(model, config)
    if not isinstance(config.sharding, ZeroSharding):
        return 4.0 * trained if config.world_size > 1 else 0.0
    buffers = 2 if config.sharding.overlap_communication and not config.sharding.shards_parameters else 1
    return float(min(sizes_of(config.sharding, model).bucket, trained) * buffers * compute_width(config))


def gathered_bytes(model: Architecture, config: RunConfig, *, least: bool = False) -> float:
    """Whole parameters on a rank under ZeRO-3: DeepSpeed keeps what it meets again within a thousand million elements.

    `least`: only the largest layer and the next one are gathered.
    """
    if not isinstance(config.sharding, ZeroSharding) or not config.sharding.shards_parameters:
        return 0.0
    whole = whole_bytes(model, config)
    width = whole / count_parameters(model).total
    largest = layer_parameters(model) * width
    if least:
        return min(whole, 2 * largest)
    return min(whole, (LIVE_ELEMENTS + sizes_of(config.sharding, model).prefetch) * compute_width(config) + largest)


def persistent_bytes(model: Architecture, config: RunConfig) -> float:
    """Parameters too small to shard: under ZeRO-3 they also stay whole on every rank."""
    if not isinstance(config.sharding, ZeroSharding) or not config.sharding.shards_parameters:
        return 0.0
    limit, rank = sizes_of(config.sharding, model).persistence, low_rank(config.tuning)
    sizes = [linear.inputs * linear.outputs for linear in linear_layers(model)]
    sizes += [size * rank for linear in linear_layers(model) for size in (linear.inputs, linear.outputs)]
    vectors = 4 * model.hidden_size
    small = vectors + sum(size for size in sizes if size < limit)
    return float(small * model.num_hidden_layers * compute_width(config))


def secondary_bytes(model: Architecture, config: RunConfig) -> float:
    """ZeRO++'s second copy of the shards (2306.10209, hpZ): all weights, divided by the ranks of a node alone."""
    if not isinstance(config.sharding, ZeroSharding) or config.sharding.hpz_partition_size is None:
        return 0.0
    return whole_bytes(model, config) / config.sharding.hpz_partition_size


def whole_bytes(model: Architecture, config: RunConfig) -> float:
    """Every parameter, unsharded, as this run holds it."""
    if config.tuning.is_adapter:
        return base_bytes(model, config) + trainable_parameters(model, config) * adapter_width(config)
    return float(count_parameters(model).total * trained_width(config))


def step_bytes(model: Architecture, config: RunConfig) -> float:
    """fp32 copies of gradients that DeepSpeed makes for its step: of the partition, or of a sub-group under ZeRO-3."""
    if not config.sharding.is_deepspeed:
        return 0.0
    own = trainable_parameters(model, config) / shards_of(config).optimizer
    return 4.0 * (min(own, SUB_GROUP_ELEMENTS) if config.sharding.shards_parameters else own)


def largest_tensor_bytes(model: Architecture) -> float:
    """The embedding in fp32."""
    return model.vocab_size * model.hidden_size * 4.0


def streamed_bytes(model: Architecture, config: RunConfig) -> float:
    """What is on the host while weights go from the files to a device: a layer or the embedding, and its cast."""
    largest = max(layer_parameters(model), model.vocab_size * model.hidden_size)
    return 2.0 * largest * compute_width(config)


def loaded_layers_bytes(model: Architecture, config: RunConfig) -> float:
    """Layers that are whole on a rank's device before ZeRO-3 shards them, in 4 bits too: they are quantised there."""
    if not config.sharding.shards_parameters:
        return 0.0
    largest = max(layer_parameters(model), model.vocab_size * model.hidden_size)
    return 2.0 * largest * compute_width(config)


def held_bytes(config: RunConfig, whole: float) -> float:
    """A rank's part of a model that is only scored."""
    return whole / config.world_size if config.sharding.shards_parameters else whole

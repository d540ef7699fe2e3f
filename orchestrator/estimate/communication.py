"""Bytes exchanged by the ranks in an optimizer step, and their time. Must not import torch.

Ring collectives (1910.02054, section 7): all-gather and reduce-scatter of S bytes move S (n - 1) / n through every
rank, an all-reduce twice that. Between nodes the rings share the node's network cards, so the slower of link and
network decides.
"""

from __future__ import annotations

from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.estimate.frozen_base import frozen_bytes
from orchestrator.estimate.model_states import trainable_parameters

CPU_ADAM_PARAMETERS_PER_SECOND = 4e9
"""Of one node (ZeRO-Offload, 2101.06840, table 4: 8 B in 2.4 s, 2 B in 0.5 s; rounded)."""


def exchanged_bytes(model: Architecture, config: RunConfig, *, micro_batches: int) -> float:
    """Bytes through one rank in one optimizer step."""
    world, sharding = config.world_size, config.sharding
    share = (world - 1) / world
    trained = trainable_parameters(model, config)
    if not sharding.is_deepspeed:
        return 2 * share * 4 * trained  # DDP: fp32 gradients, once a step
    width = _width(config)
    gradients, parameters = share * width * trained, share * width * trained
    if sharding.shards_parameters:
        passes = gathering_passes(model, config)
        gathered = share * (frozen_bytes(model, config) + width * trained)
        return micro_batches * (passes * gathered + gradients)
    # ZeRO-1 reduces gradients once a step, ZeRO-2 after every micro-batch
    return (micro_batches if sharding.stage == 2 else 1) * gradients + parameters


def exchange_seconds(config: RunConfig, exchanged: float) -> float | None:
    """Time of the exchange without overlap; None if a bandwidth is unknown."""
    if config.world_size == 1:
        return 0.0
    cluster = config.cluster
    rates = [cluster.hardware.link_gbytes_per_second] if cluster.processes_per_node > 1 else []
    if cluster.nodes > 1:
        rates.append(cluster.interconnect_gbytes_per_second)
    known = [rate for rate in rates if rate is not None]
    return None if len(known) < len(rates) else exchanged / (min(known) * 1e9)


def offload_seconds(model: Architecture, config: RunConfig, *, micro_batches: int) -> float | None:
    """Time of transfers to the host and back, and of Adam there; None if the bandwidth is unknown."""
    sharding, host = config.sharding, config.cluster.hardware.host_gbytes_per_second
    moved, adam = 0.0, 0.0
    trained, width = trainable_parameters(model, config) / config.world_size, _width(config)
    if sharding.offloads_optimizer:
        moved += 2 * width * trained  # gradients down, weights up
        adam = trained * config.cluster.processes_per_node / CPU_ADAM_PARAMETERS_PER_SECOND
    if sharding.offloads_parameters:
        shard = frozen_bytes(model, config) / config.world_size + width * trained
        moved += micro_batches * gathering_passes(model, config) * shard
    if not moved:
        return 0.0
    return None if host is None else adam + moved / (host * 1e9)


def gathering_passes(model: Architecture, config: RunConfig) -> float:
    """Passes of a micro-batch over the weights: forward, backward, and recomputation."""
    return 2 + config.model.recomputed_layers(model.num_hidden_layers) / model.num_hidden_layers


def dequantised_bytes(model: Architecture, config: RunConfig, *, micro_batches: int) -> float:
    """Memory traffic of one step for dequantising 4-bit weights to 16 bits: about 2.5 bytes per parameter and pass."""
    if not config.quantization.is_4bit:
        return 0.0
    linear = frozen_bytes(model, config, per_linear=2.5, per_embedding=0.0)
    return micro_batches * gathering_passes(model, config) * linear


def _width(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4

"""How a model is distributed over the ranks: a full copy on each, or ZeRO 1 to 3. Must not import torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import NaturalInt, PositiveInt, Section


class NoSharding(Section):
    """One process, or DDP: every rank holds everything."""

    strategy: Literal["none"]

    @property
    def is_deepspeed(self) -> bool:
        return False

    @property
    def stage(self) -> int:
        return 0

    @property
    def shards_parameters(self) -> bool:
        return False

    @property
    def overlaps_communication(self) -> bool:
        """DDP reduces buckets during the backward pass."""
        return True

    @property
    def offloads_optimizer(self) -> bool:
        return False

    @property
    def offloads_parameters(self) -> bool:
        return False


class ZeroSharding(Section):
    """DeepSpeed ZeRO (1910.02054)."""

    strategy: Literal["zero1", "zero2", "zero3"]
    offload_optimizer: Literal["none", "cpu"]
    offload_parameters: Literal["none", "cpu"]
    """Only under zero3."""
    overlap_communication: bool
    bucket_elements: PositiveInt | None
    """Elements of a reduce or gather bucket; null takes one layer of the model."""
    prefetch_elements: NaturalInt | None
    """Elements gathered ahead under zero3; null takes one layer of the model."""
    persistence_elements: NaturalInt | None
    """Parameters smaller than this stay gathered under zero3; null takes ten hidden sizes, but at least 100,000."""
    hpz_partition_size: PositiveInt | None
    """ZeRO++ (2306.10209, hpZ) under zero3: a second copy of the shards within this many ranks (one node), so that the
    backward pass gathers inside the node; null keeps none."""
    quantized_weights: bool
    """ZeRO++ (qwZ) under zero3: weights are gathered in 8 bits; needs GPUs."""
    quantized_gradients: bool
    """ZeRO++ (qgZ) under zero3: gradients are reduced in 4 and 8 bits; needs GPUs."""

    generate_by_layer: bool
    """Under zero3, how a model in training generates: false gathers the whole model on every rank for the length of a
    rollout; true gathers each layer for each token, slower by far, where the whole model does not fit."""

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed owns the optimizer: trained weights are then in `model.dtype`, next to fp32 masters."""
        return True

    @property
    def stage(self) -> int:
        """ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters."""
        return int(self.strategy.removeprefix("zero"))

    @property
    def shards_parameters(self) -> bool:
        return self.stage == 3

    @property
    def overlaps_communication(self) -> bool:
        return self.overlap_communication

    @property
    def offloads_optimizer(self) -> bool:
        return self.offload_optimizer != "none"

    @property
    def offloads_parameters(self) -> bool:
        return self.offload_parameters != "none"

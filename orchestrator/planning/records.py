"""The plan of a run, and of each of its stages, as records. Must not import torch."""

from __future__ import annotations

from typing import Any, Literal

from orchestrator.config.base import Section
from orchestrator.estimate.cost import CostPlan
from orchestrator.estimate.memory_records import MemoryForecast
from orchestrator.estimate.stage_time import CheckpointPlan, TimePlan


class StagePlan(Section):
    """One stage in numbers."""

    name: str
    kind: str
    input: str
    train_rows: int | None
    """Rows without the held-out ones; None if unknown before a download or packing."""
    evaluation_rows: int | None
    data_format: str | None
    data_source: str
    packing: str
    max_length: int
    global_size: int | None
    """None, like all that depends on it, for a stage that trains nothing."""
    micro_size: int
    world_size: int
    accumulation_steps: int | None
    steps_per_epoch: int | None
    steps: int | None
    warmup_steps: int | None
    learning_rates: dict[str, float]
    """Learning rate at 0, 25, 50 and 100 % of the steps."""
    trainable_parameters: int | None
    parameters: int | None
    memory: MemoryForecast | None
    """None if the base's facts are unknown before a download."""
    flops_per_token: float | None
    """Useful ones, at the documents' lengths."""
    tokens: int | None
    """Per epoch, like `trained_tokens`; None before the data is prepared."""
    trained_tokens: int | None
    time: TimePlan | None
    cost: CostPlan | None
    checkpointing: CheckpointPlan | None
    attention: str | None
    """Description of the implementation, as in the log; None, like `loss_head`, for a stage that trains nothing."""
    loss_head: str | None
    deepspeed: dict[str, Any] | None
    script: str
    outputs: tuple[str, ...]


class Plan(Section):
    """A run in numbers, made without submitting or writing anything."""

    name: str
    run_directory: str
    launcher: Literal["local", "torchrun", "slurm"]
    base: str
    base_source: str
    dtype: Literal["float32", "bfloat16"]
    dtype_is_auto: bool
    dtype_reason: str
    tuning: str
    quantization: str
    sharding: str
    nodes: int
    processes_per_node: int
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Every preset value that was changed to fit a typed value or the number of ranks. Frozen plans of older runs have
    none."""

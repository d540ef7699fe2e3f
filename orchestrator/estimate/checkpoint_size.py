"""What a checkpoint takes on disk. Must not import torch."""

from __future__ import annotations

import math

from orchestrator.config.training import CheckpointConfig, OptimizerConfig


def bytes_of_one(trained_parameters: int, optimizer: OptimizerConfig) -> int:
    """Size of a checkpoint: fp32 weights and two moments (8-bit ones with a scale for 256 elements); headers left out."""
    moments = 2 * (1 + 4 / 256) if optimizer.has_8bit_states else 8
    return int(trained_parameters * (4 + moments))


def most_bytes(one: int, settings: CheckpointConfig, steps: int) -> int:
    """Disk that a stage's checkpoints take at most: those that retention keeps, and one that is being written."""
    every = settings.every_steps or steps
    saves = -(-steps // every)
    kept = settings.keep_last + int(settings.keep_best)
    if settings.keep_every is not None:
        kept += steps // math.lcm(every, settings.keep_every)
    return one * (min(kept, saves) + 1)

"""Empirical figures of the memory forecast, each with its source. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Range:
    """Certain, likely and possible use."""

    low: float
    expected: float
    high: float


CONTEXT_BYTES = Range(low=0.5 * GIB, expected=0.6 * GIB, high=0.9 * GIB)
"""CUDA context and kernels of torch and cuBLAS; the allocator does not see it. Measured by others: 0.5-0.9 GiB."""

CPU_PROCESS_BYTES = Range(low=0.3 * GIB, expected=0.5 * GIB, high=0.8 * GIB)
"""Overhead of a rank on the processor: the interpreter with torch, transformers and PEFT, 0.4 GiB resident before the
first tensor (measured), plus what kernels and allocator keep."""

COMMUNICATION_BYTES = Range(low=0.5 * GIB, expected=1.0 * GIB, high=2.0 * GIB)
"""NCCL's channels and buffers where there is more than one rank; the allocator does not see them. Measured by others: 1-2 GiB."""

SLACK_SHARE = Range(low=0.0, expected=0.04, high=0.12)
"""Of what changes within a step (activations, temporaries, gathered parameters): blocks of the caching allocator that are
reserved and do not fit the next request. An assumption until it is measured on a device."""

TRAINED_SHARE = Range(low=0.25, expected=1.0, high=1.0)
"""Share of trained tokens in a batch; the data, not the plan, decides it. Their logits are copied in fp32 by the
loss."""

HOST_PROCESS_BYTES = Range(low=1.5 * GIB, expected=3.0 * GIB, high=6.0 * GIB)
"""A rank's interpreter with torch, transformers and CUDA's libraries."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance, which the DeepSpeed dict leaves at their defaults."""

SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's sub_group_size: parameters that one part of a ZeRO-3 step updates at a time; left at its default."""

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
"""Elements that share a constant, and constants that share one of theirs (2305.14314, section 3)."""

NF4_TABLES_BYTES = (64, 1024 + 4)
"""bitsandbytes keeps with every layer: the code of 16 values; with double quantisation also one of 256, and an offset."""

MOMENTS_8BIT_BYTES = 2 * (1 + 4 / 256)
"""AdamW in 8 bits: two moments of a byte, each with an fp32 constant for 256 elements (2110.02861; bitsandbytes)."""

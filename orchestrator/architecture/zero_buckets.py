"""Sizes of ZeRO's buckets from the shape of the model, unless configured. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.sharding import ZeroSharding

MOST_ELEMENTS = 200_000_000
"""Elements of a bucket: 400 MB in 16 bits, doubled if communication overlaps."""
LEAST_ELEMENTS = 1_000_000
UNKNOWN_ELEMENTS = 50_000_000
"""If the model's shape is unknown."""
PERSISTENT_ELEMENTS = 100_000
"""DeepSpeed's own default: gathering less costs more than holding it."""


@dataclass(frozen=True, kw_only=True)
class ZeroSizes:
    """Numbers of elements."""

    bucket: int
    prefetch: int
    persistence: int


def sizes_of(sharding: ZeroSharding, model: Architecture | None) -> ZeroSizes:
    """The configured sizes; else one layer per bucket and one layer ahead, so that one is computed while the next is
    transferred.

    Parameters below ten hidden sizes (norms, biases) stay gathered.
    """
    layer, vectors = UNKNOWN_ELEMENTS, 0
    if model is not None:
        layer = min(max(count_parameters(model).layer, LEAST_ELEMENTS), MOST_ELEMENTS)
        vectors = 10 * model.hidden_size
    return ZeroSizes(
        bucket=layer if sharding.bucket_elements is None else sharding.bucket_elements,
        prefetch=layer if sharding.prefetch_elements is None else sharding.prefetch_elements,
        persistence=max(PERSISTENT_ELEMENTS, vectors)
        if sharding.persistence_elements is None
        else sharding.persistence_elements,
    )


def with_zero_buckets(config: RunConfig, model: Architecture | None) -> RunConfig:
    """The configuration with every size settled; unchanged without ZeRO."""
    if not isinstance(config.sharding, ZeroSharding):
        return config
    sizes = sizes_of(config.sharding, model)
    sharding = config.sharding.model_copy(
        update={
            "bucket_elements": sizes.bucket,
            "prefetch_elements": sizes.prefetch,
            "persistence_elements": sizes.persistence,
        }
    )
    return config.model_copy(update={"sharding": sharding})

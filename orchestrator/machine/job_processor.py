"""Conditions of a speed measured on a processor: the processor, its limits and the threads. Must not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from orchestrator.config.base import Section
from orchestrator.config.run import RunConfig
from orchestrator.machine.processor import Processor


class ProcessorKey(Section):
    """Two measurements are comparable if all of these are equal."""

    name: str
    onednn_limit: str
    aten_limit: str
    threads: str
    """`OMP_NUM_THREADS`, or the number of cores if torch chooses."""


def processor_key(processor: Processor, environment: Mapping[str, str]) -> ProcessorKey:
    """The key of a rank that runs in `environment` on this machine; plan and rank must compute the same key, so torch
    is not asked.
    """
    return ProcessorKey(
        name=processor.name,
        onednn_limit=processor.onednn_limit,
        aten_limit=processor.aten_limit,
        threads=environment.get("OMP_NUM_THREADS") or f"{len(os.sched_getaffinity(0))} cores",
    )


def job_environment(config: RunConfig) -> dict[str, str]:
    """The environment of a rank; several ranks share the cores as in the scripts (launchers/shell.py)."""
    environment = {**os.environ, **config.cluster.environment}
    ranks = config.cluster.processes_per_node
    if ranks > 1 and "OMP_NUM_THREADS" not in environment:
        cores = config.cluster.cpus_per_task or os.cpu_count() or 1
        is_asked = config.cluster.cpus_per_task is not None
        environment["OMP_NUM_THREADS"] = str(max(1, cores // ranks if is_asked else -(-cores // ranks)))
    return environment

"""This machine, and whether the ranks of a run are on it; must not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.run import RunConfig
from orchestrator.machine.accelerators import Gpu, oldest_gpu
from orchestrator.machine.processor import Processor, this_processor


@dataclass(frozen=True, kw_only=True)
class Machine:
    """This machine's compute devices; `gpu` is None if torch will see none."""

    processor: Processor
    gpu: Gpu | None


def this_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """This machine's compute devices, under the shell's variables and those that the cluster profile sets for the
    ranks.
    """
    return Machine(processor=this_processor({**os.environ, **(environment or {})}), gpu=oldest_gpu())


def is_here(config: RunConfig) -> bool:
    """Whether the ranks run on this machine, according to the configuration."""
    return config.launcher.kind != "slurm" and config.cluster.nodes == 1


def device_of(config: RunConfig, machine: Machine) -> Literal["cpu", "cuda"]:
    """The device of a rank; under Slurm that of the request, independent of this machine."""
    cluster = config.cluster
    if cluster.device != "auto":
        return cluster.device
    if cluster.hardware.name == "cpu":
        return "cpu"
    if cluster.hardware.name != "unknown":
        return "cuda"
    if is_here(config):
        return "cpu" if machine.gpu is None else "cuda"
    return "cuda" if _asks_for_gpus(cluster) else "cpu"


def with_device(config: RunConfig, machine: Machine) -> RunConfig:
    """The configuration with `auto` replaced by the device, for the arithmetic of a plan.

    Never frozen: the run may resume on another device.
    """
    cluster = config.cluster.model_copy(update={"device": device_of(config, machine)})
    return config.model_copy(update={"cluster": cluster})


def _asks_for_gpus(cluster: ClusterConfig) -> bool:
    return cluster.gpu_request != "none" and cluster.gpus_per_node > 0

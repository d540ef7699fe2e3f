"""Replaces unknown hardware in a configuration by this machine's, for the arithmetic of a plan.

Must not import torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.composition.compose import presets
from orchestrator.config.cluster import HardwareConfig
from orchestrator.config.run import RunConfig
from orchestrator.machine.this_machine import Machine, is_here, with_device

GIB = 2**30


def as_seen(
    config: RunConfig, machine: Machine, config_directory: Path | None, *, assumes_speed: bool = False
) -> RunConfig:
    """Replace `auto` by the device; for ranks on this machine's processor also fill in its memory and the bandwidths of
    conf/hardware/cpu.yaml.

    `assumes_speed` takes that file's peak as well: good enough to rank settings of one machine, not to promise a time.
    Never frozen. The hardware keeps its name, because measurements are found by it.
    """
    config = with_device(config, machine)
    hardware, cluster = config.cluster.hardware, config.cluster
    if cluster.device != "cpu" or not is_here(config):
        return config
    if hardware.peak_tflops is None:
        known = HardwareConfig.model_validate(presets("hardware", config_directory)["cpu"])
        kept = {"name": hardware.name, "memory_gib": hardware.memory_gib}
        unsure = {} if assumes_speed else {"peak_tflops": None, "achieved": hardware.achieved}
        hardware = known.model_copy(update={**kept, **unsure})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    native = machine.processor.has_native_bfloat16 if hardware.native_bfloat16 is None else hardware.native_bfloat16
    memory = hardware.memory_gib or total / cluster.processes_per_node
    hardware = hardware.model_copy(update={"memory_gib": memory, "native_bfloat16": native})
    changes = {"hardware": hardware, "node_memory_gib": cluster.node_memory_gib or total}
    return config.model_copy(update={"cluster": cluster.model_copy(update=changes)})

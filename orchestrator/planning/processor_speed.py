"""The speed of this machine's processor for the forecast: measured once in a separate process, then cached.

Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.architecture.base_model import Base
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.tuning import LoraTuning
from orchestrator.errors import RunFolderError
from orchestrator.estimate.step_time import Rate
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.cache import cache_folder
from orchestrator.machine.job_processor import job_environment, processor_key
from orchestrator.machine.this_machine import Machine, is_here
from orchestrator.planning.data_facts import DataFacts

SWITCH = "ORCHESTRATOR_PROBE"
"""`off` in the environment: nothing is measured for a plan."""
PROBE_SECONDS = 120
"""Timeout that allows for importing torch from a slow disk; the measurement itself takes half a second."""
PROBE = 2
"""Raised when the measurement itself changes, so that cached ones of the old kind are not used."""
BUSY_FOR_SECONDS = 600
"""Lifetime of a measurement made while other work kept the processor busy."""


def with_speeds(
    config: RunConfig, machine: Machine, base: Base, data: Mapping[str, DataFacts], *, may_measure: bool
) -> dict[str, DataFacts]:
    """The facts with this processor's rate if the ranks run on it; only a cached rate unless measuring is allowed."""
    if base.architecture is None or config.cluster.device != "cpu" or not is_here(config):
        return dict(data)
    found: dict[str, DataFacts] = {}
    for name, facts in data.items():
        rate = None
        if config.stages[name].trains:
            rate = probed_rate(config.for_stage(name), machine, base.architecture, may_measure=may_measure)
        found[name] = replace(facts, probed=rate)
    return found


def probed_rate(config: RunConfig, machine: Machine, model: Architecture, *, may_measure: bool) -> Rate | None:
    """Rate of one rank; None if it was not measured."""
    environment = job_environment(config)
    is_emulated = config.model.dtype == "bfloat16" and not machine.processor.has_native_bfloat16
    setting = {**setting_of(config, model), "compares": is_emulated}
    key = {
        "processor": processor_key(machine.processor, environment).model_dump(),
        "flags": sorted(machine.processor.flags),
        "torch": _torch_version(),
        "probe": PROBE,
        "setting": setting,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder(config.cluster.scratch) / "speed" / f"{digest}.json"
    known = _known(file)
    if known is None and may_measure and os.environ.get(SWITCH, "").lower() != "off":
        known = _measure(config, setting, environment)
        if known is not None:
            with suppress(OSError, RunFolderError):  # without a writable cache, measured again next time
                write_json(file, {**known, "key": key})
    return None if known is None else _rate(known, machine, config.model.dtype)


def setting_of(config: RunConfig, model: Architecture) -> dict[str, Any]:
    """What decides the rate: shapes, trained weights and number type; all of the probe's Setting but `compares`."""
    tuning = config.tuning
    is_full = not tuning.is_adapter
    return {
        "hidden": model.hidden_size,
        "inner": model.intermediate_size,
        "layers": model.num_hidden_layers,
        "queries": model.num_attention_heads * model.head_dim,
        "keys": model.num_key_value_heads * model.head_dim,
        "vocabulary": model.vocab_size,
        "head_dim": model.head_dim,
        "experts": model.num_experts_per_token or 1,
        "method": "full" if is_full else "adapter",
        "rank": tuning.rank if isinstance(tuning, LoraTuning) else 0,
        "dtype": config.model.dtype,
    }


def _known(file: Path) -> Mapping[str, Any] | None:
    """A cached measurement that is still valid."""
    try:
        known: Any = read_json(file)
        is_stale = known["was_busy"] and time.time() - known["time"] > BUSY_FOR_SECONDS
        return None if is_stale or not known["flops_per_second"] > 0 or "slowdown" not in known else known
    except (OSError, RunFolderError, KeyError, TypeError):  # a cache of another user is no cache
        return None


def _measure(config: RunConfig, setting: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """None if torch cannot be run: the plan then says that it has no forecast."""
    print("measuring this processor's speed for the forecast, once (a few seconds)", file=sys.stderr, flush=True)
    python = config.launcher.python or sys.executable
    # A process of its own: the login side never imports torch.
    argv = [python, "-m", "orchestrator.preflight.processor_probe", json.dumps(dict(setting))]
    try:
        answer = subprocess.run(
            argv,
            env={**environment, "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
        measured: dict[str, Any] = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return {**measured, "time": time.time()}


def _rate(known: Mapping[str, Any], machine: Machine, dtype: str) -> Rate:
    threads = int(known["threads"])
    busy = ", while it was busy" if known["was_busy"] else ""
    return Rate(
        flops_per_second=float(known["flops_per_second"]),
        is_whole=False,
        rollout_seconds=None,
        slowdown=known["slowdown"],
        basis=f"{machine.processor.name}: {known['flops_per_second'] / 1e9:.3g} GFLOP/s measured in {dtype} with "
        f"{threads} thread{'s' if threads > 1 else ''}{busy}",
    )


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"

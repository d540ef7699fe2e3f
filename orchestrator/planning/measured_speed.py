"""Speed measured by runs, for the next plan on this machine and for `status`. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from pydantic import ValidationError

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.base import Section
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, training_stages
from orchestrator.estimate.flops import executed_flops_per_token, flops_per_token
from orchestrator.estimate.step_time import Rate
from orchestrator.files.atomic import write_json
from orchestrator.machine.job_processor import ProcessorKey, job_environment, processor_key
from orchestrator.machine.this_machine import Machine, device_of, is_here, this_machine
from orchestrator.metrics.jsonl import Row, number_of, read_rows
from orchestrator.metrics.speed import timed_rows
from orchestrator.run_folder.folder import MEASURED, RunFolder, StageFolder

AFTER_STEPS = 50
"""Steps of an attempt after which a run writes its measurement; it is written again at the end."""
FEW_STEPS = 10
"""Fewest rows for a median: a single pause shifts one over fewer, and the first steps still fill caches; the probe's
repetitions are steadier."""
UNLIKE = 2.0
"""Ratio of a run's rate to a probe's beyond which the plan shows both: a step's work besides matrix products explains
less."""
CPU = "cpu"
"""As torch spells it."""
NEWEST_RUNS = 100
"""How many of the newest runs are searched for a measurement."""


class Measured(Section):
    """measured.json: the actual speed of a stage, and the conditions it holds for."""

    hardware: str
    """As configured; unreliable for a run on a processor, since it may have been configured for a GPU."""
    device: str
    processor: ProcessorKey | None = None
    """The processor of a CPU run; None on a GPU, and in files of an older version."""
    tuning: str
    quantization: str
    sharding: str
    dtype: str
    kind: str
    model_type: str
    parameters: int
    world_size: int
    micro_size: int
    max_length: int
    packing: str
    gradient_checkpointing: bool
    steps: int
    """Steps that were measured."""
    step_seconds: float
    """Median over the rows of metrics.jsonl, like all fields below."""
    tokens_per_second: float
    """Tokens without padding, over all ranks."""
    useful_tflops_per_device: float
    executed_tflops_per_device: float
    """Including recomputation."""
    useful_mfu: float | None
    executed_mfu: float | None
    """Shares of the hardware table's peak; None if that is unknown."""
    peak_memory_gib: float
    rollout_seconds: float
    """Per optimizer step."""
    startup_seconds: float | None
    """From the start of the rank to its first step, without the first evaluation."""
    save_seconds: float | None
    save_pause_seconds: float | None
    time: float
    """When it was written."""


@dataclass(frozen=True, kw_only=True)
class MeasurementContext:
    """Facts that the record of a stage does not contain."""

    stage: str
    model: Architecture
    attended: float
    """Mean document length as attention sees it, weighted by tokens."""
    time: float
    processor: ProcessorKey
    """Device memory of the rank that writes the measurement."""


def write_measured(folder: StageFolder, config: RunConfig, known: MeasurementContext) -> None:
    """Write measured.json from the record so far; nothing before the first rows of the attempt."""
    measured = measure(folder, config, known)
    if measured is not None:
        write_json(folder.measured, measured.model_dump(mode="json"))


def measure(folder: StageFolder, config: RunConfig, known: MeasurementContext) -> Measured | None:
    """Medians over the newest attempt's rows; None before there are any."""
    stage, model = training_stages(config)[known.stage], known.model
    events = read_rows(folder.events)
    rows = timed_rows(read_rows(folder.metrics))
    if not rows:
        return None
    device, rate = _device(events), median(_numbers(rows, "tokens_per_second"))
    useful = rate / config.world_size * flops_per_token(model, config, length=known.attended) / 1e12
    executed = rate / config.world_size * executed_flops_per_token(model, config, length=known.attended) / 1e12
    peak = config.cluster.hardware.peak_tflops
    saves = [row for row in events if row.get("event") == "save"]
    return Measured(
        hardware=config.cluster.hardware.name,
        device=device,
        processor=known.processor if device == CPU else None,
        tuning=config.tuning.method,
        quantization=config.quantization.scheme,
        sharding=config.sharding.strategy,
        dtype=config.model.dtype,
        kind=stage.kind,
        model_type=model.model_type,
        parameters=count_parameters(model).total,
        world_size=config.world_size,
        micro_size=stage.batch.micro_size,
        max_length=stage.data.max_length,
        packing=stage.data.packing,
        gradient_checkpointing=config.model.gradient_checkpointing,
        steps=int(sum(_numbers(rows, "num_steps"))),
        step_seconds=median(_numbers(rows, "step_seconds")),
        tokens_per_second=rate,
        useful_tflops_per_device=useful,
        executed_tflops_per_device=executed,
        useful_mfu=None if peak is None else useful / peak,
        executed_mfu=None if peak is None else executed / peak,
        peak_memory_gib=max(_numbers(rows, "memory_gib"), default=0.0),
        rollout_seconds=sum(_numbers(rows, "rollout_seconds")) / max(1.0, sum(_numbers(rows, "num_steps"))),
        startup_seconds=_startup_seconds(events, read_rows(folder.metrics)),
        save_seconds=_middle(_numbers(saves, "save_seconds")),
        save_pause_seconds=_middle(_numbers(saves, "save_stall_seconds")),
        time=known.time,
    )


def read_measured(folder: StageFolder) -> Measured | None:
    """The measurement of a stage; None if it has none, or another version wrote it."""
    try:
        return Measured.model_validate(json.loads(folder.measured.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def find_measured(config: RunConfig, name: str, model: Architecture) -> tuple[Measured, str] | None:
    """The newest measurement in neighbouring runs that applies to this one, and that run's name.

    Device, method, quantization, sharding, number type, kind of stage and model must be the same.
    """
    wanted = {
        "tuning": config.tuning.method,
        "quantization": config.quantization.scheme,
        "sharding": config.sharding.strategy,
        "dtype": config.model.dtype,
        "kind": config.stages[name].kind,
        "model_type": model.model_type,
        "parameters": count_parameters(model).total,
    }
    fitting = [
        (found, name)
        for found, name in _measurements(Path(config.output_dir))
        if {key: getattr(found, key) for key in wanted} == wanted
    ]
    if not fitting:  # inspecting the machine costs time
        return None
    machine = this_machine(config.cluster.environment)
    return max(
        (pair for pair in fitting if _has_device(pair[0], config, machine)),
        key=lambda pair: pair[0].time,
        default=None,
    )


def _has_device(measured: Measured, config: RunConfig, machine: Machine) -> bool:
    """Whether the ranks of a configuration compute on what was measured: the named GPU, or this very processor."""
    if device_of(config, machine) == "cuda":
        return measured.device.startswith("cuda") and measured.hardware == config.cluster.hardware.name
    # processors of other nodes are unknown, and the hardware's name does not identify one
    here = is_here(config) and measured.device == CPU
    return here and measured.processor == processor_key(machine.processor, job_environment(config))


def measured_rate(measured: Measured, run: str, config: RunConfig) -> Rate:
    """The rate of an earlier run; with the same number of ranks it covers the whole step."""
    is_whole = measured.world_size == config.world_size
    ranks = "" if is_whole else f" on {measured.world_size} ranks, communication estimated"
    return Rate(
        flops_per_second=measured.executed_tflops_per_device * 1e12,
        is_whole=is_whole,
        rollout_seconds=measured.rollout_seconds if measured.kind == "grpo" else None,
        basis=f"measured by run {run}: {measured.tokens_per_second:,.0f} tokens/s over {measured.steps} steps{ranks}",
    )


def steadier_rate(measured: Measured, run: str, config: RunConfig, probed: Rate | None) -> Rate:
    """The rate of an earlier run, or the probe's if that run was short; the basis names both if they differ much."""
    own = measured_rate(measured, run, config)
    if probed is None:
        return own
    if measured.steps < FEW_STEPS:
        steps = f"{measured.steps} step{'s' if measured.steps != 1 else ''}"
        return replace(probed, basis=f"{probed.basis} (run {run} measured only {steps})")
    factor = probed.flops_per_second / own.flops_per_second
    if 1 / UNLIKE <= factor <= UNLIKE:
        return own
    compared = (
        f"{factor:.1f}x that rate: was the machine busy then?" if factor > 1 else f"1/{1 / factor:.1f} of that rate"
    )
    return replace(own, basis=f"{own.basis}; but a measurement of the processor alone gives {compared}")


def _measurements(output: Path) -> Iterator[tuple[Measured, str]]:
    """Of the newest runs of an output folder."""
    try:
        files = sorted(output.glob(f"*/*/{MEASURED}"), key=lambda file: file.stat().st_mtime, reverse=True)
    except OSError:
        return
    for file in files[:NEWEST_RUNS]:
        found = read_measured(RunFolder(file.parent.parent).stage(file.parent.name))
        if found is not None:
            yield found, file.parent.parent.name


def _startup_seconds(events: Sequence[Row], rows: Sequence[Row]) -> float | None:
    """Rows of the newest attempt that trained."""
    began: float | None = None
    seconds: float | None = None
    for row in events:
        if row.get("event") == "start":
            began = number_of(row, "began")
        time = number_of(row, "time")
        if row.get("event") == "train" and began is not None and time is not None:
            scored = [one for one in rows if began <= (number_of(one, "time") or 0.0) <= time]
            seconds = time - began - sum(_numbers(scored, "eval_seconds"))
    return seconds


def _device(events: Sequence[Row]) -> str:
    devices = [str(row["device"]) for row in events if row.get("event") == "start" and "device" in row]
    return devices[-1] if devices else "unknown"


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [number for row in rows if (number := number_of(row, key)) is not None]


def _middle(numbers: Sequence[float]) -> float | None:
    return median(numbers) if numbers else None

"""The measured rate of this machine's processor: one measurement, the same for every form of the plan; what keys its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Asker

from orchestrator.architecture.base_model import Base
from orchestrator.composition.compose import compose
from orchestrator.estimate.step_time import Rate
from orchestrator.machine.dtype import settle
from orchestrator.machine.job_processor import job_environment
from orchestrator.machine.processor import Processor
from orchestrator.machine.this_machine import Machine, this_machine
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.host_hardware import as_seen
from orchestrator.planning.plan import make_plan
from orchestrator.planning.processor_speed import setting_of

LORA = ("+experiment=llama_lora", "launcher=local", "cluster.device=cpu", "model.dtype=float32")
MEASURING = "measuring this processor's speed"


def test_one_measurement_serves_the_plan_the_named_processor_and_the_advice(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_PROBE", "on")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = ask("plan", *LORA, "format=json")
    assert any(MEASURING in line for line in first.errors), first
    time = json.loads(first.out)["stages"][0]["time"]
    assert "GFLOP/s measured in float32 with 1 thread" in time["basis"] and time["step_seconds"] > 0
    named = ask("plan", *LORA, "hardware@cluster.hardware=cpu", "format=json")
    assert not any(MEASURING in line for line in named.errors)
    assert json.loads(named.out)["stages"][0]["time"]["step_seconds"] == pytest.approx(time["step_seconds"], rel=0.05)
    advice = ask("plan", *LORA, "advise=true", "format=json")
    assert not any(MEASURING in line for line in advice.errors)
    own = next(
        option
        for option in json.loads(advice.out)["fitting"]
        if option["sharding"] == "none" and not option["checkpointing"] and option["micro_sizes"] == {"sft": 4}
    )
    assert own["step_seconds"]["sft"] == pytest.approx(time["step_seconds"], rel=0.05)


def test_a_typed_bfloat16_that_is_emulated_is_warned_of_with_its_factor() -> None:
    old = Machine(processor=Processor(name="old", flags=frozenset(), onednn_limit="", aten_limit=""), gpu=None)
    config = compose([*LORA[:3], "model.dtype=bfloat16"])
    rate = Rate(flops_per_second=1e9, is_whole=False, rollout_seconds=None, basis="x", slowdown=7.61)
    facts = DataFacts(train_rows=9, evaluation_rows=1, format="alpaca", bytes=1, probed=rate)
    base = Base(source="hub", location="x", architecture=None)
    planned = make_plan(config, base=base, data={"sft": facts}, number_type=settle(config, old, is_auto=False))
    assert any("type model.dtype=auto; measured here" in one and "take 7.6x as long" in one for one in planned.warnings)


def probe(*, threads: int, dtype: str, compares: bool = False) -> dict[str, Any]:
    """Measure the shapes of a tiny model, so that the process costs little more than its import of torch."""
    shapes = {"hidden": 64, "inner": 128, "layers": 2, "queries": 64, "keys": 32, "vocabulary": 512, "head_dim": 16}
    rest = {"experts": 1, "method": "full", "rank": 0, "dtype": dtype, "compares": compares}
    argv = [sys.executable, "-m", "orchestrator.preflight.processor_probe", json.dumps({**shapes, **rest})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    measured: dict[str, Any] = json.loads(answer.stdout)
    return measured


def test_the_probe_compares_an_emulated_type_with_float32() -> None:
    assert probe(threads=1, dtype="bfloat16", compares=True)["slowdown"] > 0


def test_a_measurement_next_to_other_work_says_so() -> None:
    """Also if that work has just begun, which the load average would not show yet."""
    cores = os.sched_getaffinity(0)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        assert probe(threads=len(cores), dtype="float32")["was_busy"]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_nothing_is_measured_or_promised_where_it_is_switched_off(ask: Asker) -> None:
    answer = ask("plan", *LORA)
    assert not any(MEASURING in line for line in answer.errors)
    assert "no forecast" in answer.out and "this processor's speed was not measured" in " ".join(answer.out.split())


def test_emulated_bfloat16_is_never_forecast_by_a_table(ask: Asker) -> None:
    words = (
        *LORA[:3],
        "model.dtype=bfloat16",
        "hardware@cluster.hardware=cpu",
        "cluster.hardware.native_bfloat16=false",
    )
    told = " ".join(ask("plan", *words).out.split())
    assert "no forecast" in told and "bfloat16 is emulated here" in told


def test_threads_and_shapes_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    two = compose([*LORA, "launcher=torchrun", "cluster.processes_per_node=2", "cluster.cpus_per_task=8"])
    assert job_environment(two)["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in job_environment(compose(list(LORA)))
    own = compose([*LORA, "+cluster.environment.OMP_NUM_THREADS='3'"])
    assert job_environment(own)["OMP_NUM_THREADS"] == "3"
    assert two.model.preset is not None
    setting = setting_of(two, two.model.preset.architecture)
    assert (setting["hidden"], setting["keys"], setting["method"], setting["rank"]) == (576, 192, "adapter", 16)


def test_the_seen_machine_is_never_frozen_and_keeps_its_name() -> None:
    config = compose(list(LORA))
    seen = as_seen(config, this_machine(), None)
    assert seen.cluster.hardware.name == config.cluster.hardware.name == "unknown"
    assert config.cluster.hardware.memory_gib is None and seen.cluster.hardware.memory_gib is not None
    elsewhere = compose(["+experiment=llama_lora", "launcher=slurm"])
    assert as_seen(elsewhere, this_machine(), None).cluster.hardware == elsewhere.cluster.hardware


def test_the_probe_is_a_program_that_needs_only_torch(tmp_path: Path) -> None:
    source = (Path(__file__).resolve().parents[3] / "orchestrator" / "preflight" / "processor_probe.py").read_text()
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {name.split(".")[0] for name in imports} <= {
        "__future__",
        "json",
        "os",
        "pathlib",
        "sys",
        "time",
        "collections",
        "dataclasses",
        "typing",
        "torch",
    }

"""Real short runs: they measure themselves, account for their wall-clock, and take as many steps as the plan said."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import forking
import pytest
from bench import Bench, Done, make_bench

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.planning.measured_speed import AFTER_STEPS, read_measured
from orchestrator.run_state.goodput import time_spent

LENGTH = ("stages.sft.max_steps=60", "stages.sft.evaluate_every_steps=20", "stages.sft.checkpoint.every_steps=15")
ON_CPU = ("launcher=local", "hardware@cluster.hardware=cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("time"))


@pytest.fixture(scope="module")
def done(bench: Bench) -> Done:
    """A finished run of sixty steps; a fork would start so fast that a hundredth of its time is nothing."""
    done = bench.run("first", *LENGTH, *ON_CPU, environment=forking.FRESH)
    done.result()
    return done


def test_the_wall_clock_is_accounted_for_to_one_percent(done: Done) -> None:
    told, spent = done.result()["goodput"], time_spent(done.sft)
    assert spent is not None
    events = read_rows(done.sft.events)
    began, finished = (float(str(row[key])) for row, key in ((events[0], "began"), (events[-1], "time")))
    assert events[-1]["event"] == "finish"
    assert spent.wall_seconds == pytest.approx(finished - began) == pytest.approx(told["wall_seconds"])
    assert abs(spent.other) <= 0.01 * spent.wall_seconds, told
    closed = float(read_json(done.sft.attempt(1))["time"])
    assert spent.wall_seconds == pytest.approx(closed - began, rel=0.01)
    seconds = [float(str(row["step_seconds"])) for row in read_rows(done.sft.metrics) if "step_seconds" in row]
    assert len(seconds) == 60 and spent.training == pytest.approx(sum(seconds))
    assert spent.goodput == pytest.approx(told["goodput"])
    assert spent.goodput == pytest.approx((spent.training + spent.rollout) / spent.wall_seconds)
    assert spent.startup > 0 and spent.evaluation > 0 and spent.saving > 0 and spent.proof > 0
    assert spent.replayed == spent.gaps == 0 and spent.rollout < 0.01


def test_a_run_writes_what_it_measured(done: Done) -> None:
    measured = read_measured(done.sft)
    assert measured is not None and measured.steps >= AFTER_STEPS
    assert (measured.hardware, measured.device, measured.kind, measured.world_size) == ("cpu", "cpu", "sft", 1)
    rates = sorted(float(str(row["tokens_per_second"])) for row in read_rows(done.sft.metrics) if "num_steps" in row)
    assert rates[20] <= measured.tokens_per_second <= rates[40]
    assert measured.useful_mfu == pytest.approx(measured.useful_tflops_per_device / 0.32)
    assert measured.executed_tflops_per_device == measured.useful_tflops_per_device  # nothing is recomputed
    row = [row for row in read_rows(done.sft.metrics) if "num_steps" in row][-1]
    assert row["mfu"] == pytest.approx(
        measured.useful_mfu * float(str(row["tokens_per_second"])) / measured.tokens_per_second
    )
    assert measured.save_seconds is not None and measured.startup_seconds is not None


def test_the_next_plan_uses_it_and_status_shows_plan_beside_real(done: Done, bench: Bench) -> None:
    measured = read_measured(done.sft)
    told = bench.run("second", *LENGTH, *ON_CPU, "format=json", verb="plan")
    (stage,) = json.loads(told.out)["stages"]
    assert stage["time"]["basis"].startswith("measured by run first: ") and measured is not None
    assert stage["time"]["tokens_per_second"] == pytest.approx(measured.tokens_per_second, rel=0.1)
    shown = bench.run("first", verb="status", words=[str(done.folder.root)])
    assert "measured (and planned)" in shown.out and f" {measured.tokens_per_second:,.0f} " in shown.out
    unlike = bench.run("third", *LENGTH, *ON_CPU, "tuning=full", "format=json", verb="plan")
    assert json.loads(unlike.out)["stages"][0]["time"]["basis"].startswith("cpu: 35%")


@pytest.mark.parametrize(("ranks", "packing"), list(product((1, 2, 4), ("none", "best_fit"))))
def test_planned_steps_are_real_steps(bench: Bench, ranks: int, packing: str, tmp_path: Path) -> None:
    """One and a half epochs of rows that the first run of each packing prepared."""
    words = (
        f"stages.sft.data.packing={packing}",
        f"cluster.processes_per_node={ranks}",
        "stages.sft.max_steps=null",
        "stages.sft.epochs=1.5",
        "stages.sft.batch.micro_size=1",
        "stages.sft.data.max_length=256",
        "launcher=local",
        f"output_dir={tmp_path}",
    )
    assert bench.run("prepared", *words, verb="prepare").code == 0
    planned = bench.run("steps", *words, "format=json", verb="plan")
    (stage,) = json.loads(planned.out)["stages"]
    assert stage["steps"] is not None and stage["tokens"] > stage["trained_tokens"] > 0
    done = bench.run("steps", *words)
    assert done.code == 0, done.told
    result = read_json(tmp_path / "steps" / "sft" / "result.json")
    assert result["steps"] == stage["steps"]

"""Steps, schedules and batches against closed forms and brute force."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path

import pytest
import yaml

from orchestrator.architecture.base_model import Base
from orchestrator.composition.compose import CONF, compose
from orchestrator.config.rules import rule_problems
from orchestrator.config.run import accumulation_steps
from orchestrator.config.training import ScheduleConfig
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.plan import make_plan
from orchestrator.schedule import (
    learning_rate_factor,
    level_opens_at,
    open_levels,
    steps_per_epoch,
    total_steps,
    warmup_steps,
)
from orchestrator.text.plurals import counted

SHAPES = [
    ScheduleConfig(name=name, warmup_ratio=warmup, decay_ratio=decay, final_ratio=final)
    for name, warmup, decay, final in product(
        ("linear", "cosine", "constant"), (0.0, 0.03, 0.5, 1.0), (None, 0.1, 1.0), (0.0, 0.1, 1.0)
    )
]


def shipped(name: str) -> ScheduleConfig:
    return ScheduleConfig.model_validate(yaml.safe_load((CONF / "schedule" / f"{name}.yaml").read_text()))


def curve(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate_factor(schedule, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_schedule_rises_to_its_peak_and_falls_to_its_end(steps: int) -> None:
    assert len(SHAPES) == 108
    for schedule in SHAPES:
        warmup = warmup_steps(schedule, steps)
        factors = curve(schedule, steps)
        assert all(0.0 <= factor <= 1.0 for factor in factors), schedule
        assert all(a < b for a, b in pairwise(factors[:warmup])), schedule
        assert all(a >= b for a, b in pairwise(factors[max(0, warmup - 1) :])), schedule
        if warmup:
            assert factors[0] == pytest.approx(1 / warmup) and factors[warmup - 1] == 1.0
        if warmup < steps:
            end = 1.0 if schedule.name == "constant" else schedule.final_ratio
            assert factors[-1] == pytest.approx(end, abs=1e-12), schedule


def test_the_falling_half_follows_its_formula() -> None:
    steps, warmup = 110, 10
    for step in range(warmup + 1, steps + 1):
        t = (step - warmup) / (steps - warmup)
        linear = ScheduleConfig(name="linear", warmup_ratio=1 / 11, decay_ratio=None, final_ratio=0.2)
        cosine = ScheduleConfig(name="cosine", warmup_ratio=1 / 11, decay_ratio=None, final_ratio=0.1)
        assert learning_rate_factor(linear, step, steps) == pytest.approx(1 - 0.8 * t)
        assert learning_rate_factor(cosine, step, steps) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * t)))
    assert learning_rate_factor(cosine, 60, steps) == pytest.approx(0.55)  # half-way: the mean of peak and end


def test_the_shipped_schedules_at_their_ends() -> None:
    ends = {
        name: (curve(shipped(name), 200)[9], curve(shipped(name), 200)[-1]) for name in ("linear", "cosine", "constant")
    }
    assert ends == {"linear": (1.0, 0.0), "cosine": (1.0, pytest.approx(0.1)), "constant": (1.0, 1.0)}


def test_the_slanted_triangle_by_hand() -> None:
    """1801.06146, equation 3, with T = 100, cut_frac = 0.1, ratio = 32: cut = 10, p = t / 10, then 1 - (t - 10) / 90."""
    factors = curve(shipped("slanted_triangular"), 100)
    assert factors[0] == pytest.approx((1 + 0.1 * 31) / 32)
    assert factors[4] == pytest.approx((1 + 0.5 * 31) / 32)
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx((1 + 0.5 * 31) / 32)
    assert factors[99] == pytest.approx(1 / 32)
    for t in range(1, 101):
        p = t / 10 if t < 10 else 1 - (t - 10) / (10 * (1 / 0.1 - 1))
        assert factors[t - 1] == pytest.approx((1 + p * (32 - 1)) / 32), t
    assert all(
        1 / 32 <= factor <= 1 for steps in (1, 2, 7, 15, 99) for factor in curve(shipped("slanted_triangular"), steps)
    )


def test_warm_up_stable_decay_by_hand() -> None:
    factors = curve(shipped("warmup_stable_decay"), 200)
    assert (factors[0], factors[9], factors[10], factors[179]) == (0.1, 1.0, 1.0, 1.0)
    assert (factors[180], factors[189], factors[199]) == (pytest.approx(0.95), pytest.approx(0.5), 0.0)


def test_a_level_opens_every_so_many_steps() -> None:
    assert [open_levels(step, every_steps=3, levels=3) for step in range(1, 10)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [open_levels(step, every_steps=2.5, levels=4) for step in range(1, 10)] == [1, 1, 1, 2, 2, 3, 3, 3, 4]
    assert level_opens_at(3, every_steps=0.1 * 10) == 4, "0.1 epochs of ten steps are one step"


@pytest.mark.parametrize(
    ("max_steps", "epochs", "per_epoch", "expected"),
    [
        (60, None, 17, 60),
        (None, 3, 34, 102),
        (None, 0.5, 35, 18),
        (None, 2.0, 1, 2),
        (60, 3, 34, 60),
        (600, 3, 34, 600),
        (2, 0.01, 34, 2),
        (None, 0.01, 34, 1),
    ],
)
def test_steps_of_a_stage(max_steps: int | None, epochs: float | None, per_epoch: int, expected: int) -> None:
    assert total_steps(max_steps=max_steps, epochs=epochs, steps_per_epoch=per_epoch) == expected


def test_an_epoch_drops_no_row() -> None:
    for rows, size in product(range(1, 40), range(1, 20)):
        steps = steps_per_epoch(rows, size)
        assert (steps - 1) * size < rows <= steps * size


def test_the_batch_rule_is_division_without_rest() -> None:
    config = compose(["+experiment=llama_lora", "launcher=torchrun"])
    stage = config.stages["sft"]
    whole_ones = 0
    for size, micro, nodes, processes in product(range(1, 26), (1, 2, 3, 4), (1, 2, 3), (1, 2, 8)):
        batch = stage.batch.model_copy(update={"global_size": size, "micro_size": micro})
        cluster = config.cluster.model_copy(update={"nodes": nodes, "processes_per_node": processes})
        one = stage.model_copy(update={"batch": batch})
        tried = config.model_copy(update={"stages": {"sft": one}, "cluster": cluster})
        whole = size % (micro * nodes * processes) == 0
        problems = rule_problems(tried)
        assert (problems == []) == whole, (size, micro, nodes, processes, problems)
        if whole:
            whole_ones += 1
            assert accumulation_steps(tried, one) * micro * nodes * processes == size
        else:
            advice = int(problems[0].rsplit("=", 1)[1])
            assert advice % (micro * nodes * processes) == 0 and advice > 0
            ranks = f"{counted(nodes, 'node')} x {counted(processes, 'process', 'processes')}"
            assert f"{micro} x ({ranks}) = {micro * nodes * processes}; " in problems[0]
    sizes = [micro * nodes * processes for micro, nodes, processes in product((1, 2, 3, 4), (1, 2, 3), (1, 2, 8))]
    assert whole_ones == sum(25 // size for size in sizes) == 144


def test_a_plan_counts_rows_steps_and_warm_up() -> None:
    config = resolve(
        compose(["+experiment=llama_full", "stages.sft.max_steps=null", "stages.sft.epochs=2"]), Path("/w")
    )
    base = Base(source="hub", location="x", architecture=None)
    (stage,) = make_plan(
        config, base=base, data={"sft": DataFacts(train_rows=100, evaluation_rows=7, format="alpaca", bytes=1)}
    ).stages
    assert (stage.steps_per_epoch, stage.steps, stage.warmup_steps) == (7, 14, 1)
    assert list(stage.learning_rates.values()) == pytest.approx([5e-5 * f for f in (1.0, *_cosine(14, 1, (3, 7, 14)))])
    assert stage.parameters is None and stage.memory is None
    unknown = make_plan(
        config, base=base, data={"sft": DataFacts(train_rows=None, evaluation_rows=None, format=None, bytes=0)}
    )
    assert unknown.stages[0].steps is None and unknown.stages[0].learning_rates == {}


def _cosine(steps: int, warmup: int, at: tuple[int, ...]) -> list[float]:
    return [0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) for step in at]

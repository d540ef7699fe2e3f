"""Step times against hand arithmetic: computing, the network, dequantisation, offloading, rollouts, padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from orchestrator.composition.compose import CONF, compose
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.statistics import PreparedFacts
from orchestrator.estimate.communication import (
    dequantised_bytes,
    exchange_seconds,
    exchanged_bytes,
    offload_seconds,
)
from orchestrator.estimate.cost import cost_of
from orchestrator.estimate.flops import executed_flops_per_token
from orchestrator.estimate.row_lengths import RowShape, expected_longest, guessed_shape, shape_of
from orchestrator.estimate.step_time import Rate, StepTime, step_time, table_rate

TOTAL, ADAPTER = 8_030_261_248, 41_943_040
EMBEDDINGS = 2 * 128_256 * 4096
LONG = RowShape(tokens=4096, computed_tokens=4096, attended=4096, source="longest")
BATCH = ("stages.sft.batch.global_size=64", "stages.sft.batch.micro_size=1", "model.gradient_checkpointing=false")


def llama() -> Architecture:
    return Architecture.model_validate(
        yaml.safe_load((CONF / "model" / "llama3_8b.yaml").read_text())["preset"]["architecture"]
    )


def config_of(*words: str, experiment: str = "llama3_8b_lora") -> RunConfig:
    return compose([f"+experiment={experiment}", *BATCH, *words])


def stage_of(config: RunConfig) -> TrainingStage:
    stage = config.stages["sft"]
    assert isinstance(stage, TrainingStage)
    return stage


def time_of(config: RunConfig, shape: RowShape = LONG) -> StepTime:
    rate = table_rate(config)
    assert rate is not None
    time = step_time(llama(), config, stage_of(config), shape=shape, rate=rate)
    assert time is not None
    return time


def test_one_h200_with_lora_by_hand() -> None:
    config = config_of("hardware@cluster.hardware=h200", "cluster.processes_per_node=1")
    flops = 64 * 4096 * executed_flops_per_token(llama(), config, length=4096)
    assert time_of(config).compute == pytest.approx(flops / (989e12 * 0.40))
    assert time_of(config).exposed_communication == 0
    assert 64 * 4096 / time_of(config).total == pytest.approx(11_800, rel=0.02)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("sharding=none",), 2 * 7 / 8 * 4 * ADAPTER),
        (("sharding=zero1",), 7 / 8 * 2 * ADAPTER * 2),
        (("sharding=zero2",), 7 / 8 * 2 * ADAPTER * (8 + 1)),
        (("sharding=zero3",), 7 / 8 * 2 * (8 * (2 * (TOTAL + ADAPTER) + ADAPTER))),
        (("sharding=zero3", "model.gradient_checkpointing=true"), 7 / 8 * 2 * (8 * (3 * (TOTAL + ADAPTER) + ADAPTER))),
        (("sharding=zero2", "tuning=full"), 7 / 8 * 2 * TOTAL * (8 + 1)),
        (("sharding=zero3", "tuning=full"), 7 / 8 * 2 * TOTAL * 8 * (2 + 1)),
        (("sharding=zero3", "cluster.processes_per_node=1"), 0),
    ],
)
def test_exchanged_bytes_by_hand(words: tuple[str, ...], expected: float) -> None:
    """Eight ranks, eight micro-batches of one row."""
    assert exchanged_bytes(llama(), config_of(*words), micro_batches=8) == pytest.approx(expected)


def test_the_slower_of_link_and_network_decides() -> None:
    assert exchange_seconds(config_of(), 450e9) == 1.0
    assert exchange_seconds(config_of("cluster.nodes=2"), 400e9) == 1.0
    assert exchange_seconds(config_of("cluster.nodes=2", "cluster.interconnect_gbytes_per_second=25"), 25e9) == 1.0
    assert exchange_seconds(config_of("cluster.nodes=2", "cluster.interconnect_gbytes_per_second=null"), 1.0) is None
    assert exchange_seconds(config_of("cluster.processes_per_node=1"), 1e9) == 0.0


def test_a_slow_network_is_seen_and_a_fast_one_hides() -> None:
    fast = config_of("sharding=zero3", "tuning=full", "cluster.nodes=2")
    slow = config_of("sharding=zero3", "tuning=full", "cluster.nodes=2", "cluster.interconnect_gbytes_per_second=12.5")
    assert time_of(fast).exposed_communication == 0
    exchange = exchange_seconds(slow, exchanged_bytes(llama(), slow, micro_batches=4))
    assert exchange is not None
    assert time_of(slow).exposed_communication == pytest.approx(exchange - 0.7 * time_of(slow).compute)
    unhidden = config_of("sharding=zero3", "tuning=full", "cluster.nodes=2", "sharding.overlap_communication=false")
    assert time_of(unhidden).exposed_communication > 0


def test_qlora_dequantises_two_and_a_half_bytes_a_parameter_and_pass() -> None:
    config = config_of("quantization=nf4", "hardware@cluster.hardware=h200", "cluster.processes_per_node=1")
    traffic = dequantised_bytes(llama(), config, micro_batches=1)
    assert traffic == pytest.approx(2 * 2.5 * (TOTAL - EMBEDDINGS))
    plain = config_of("hardware@cluster.hardware=h200", "cluster.processes_per_node=1")
    lora_seconds = 4096 * executed_flops_per_token(llama(), plain, length=4096) / (0.5 * 790e12)
    assert traffic / 4.8e12 / lora_seconds == pytest.approx(0.021, abs=0.006)


def test_few_tokens_still_read_all_weights() -> None:
    config = config_of("cluster.processes_per_node=1")
    short = RowShape(tokens=4, computed_tokens=4, attended=4, source="longest")
    weights = 2 * TOTAL + 2 * ADAPTER
    assert time_of(config, short).compute == pytest.approx(64 * 2 * weights / 3.35e12)


def test_offloading_goes_through_the_host() -> None:
    config = config_of("sharding=zero3_offload", "tuning=full")
    shard = TOTAL / 8
    moved = 2 * 2 * shard + 8 * 2 * 2 * shard
    assert offload_seconds(llama(), config, micro_batches=8) == pytest.approx(moved / 50e9 + TOTAL / 4e9)
    assert offload_seconds(llama(), config_of("sharding=zero2"), micro_batches=8) == 0.0
    unknown = config_of("sharding=zero3_offload", "tuning=full", "cluster.hardware.host_gbytes_per_second=null")
    assert offload_seconds(llama(), unknown, micro_batches=8) is None


def test_a_measured_rate_holds_for_the_whole_step() -> None:
    config = config_of("sharding=zero3", "tuning=full")
    rate = Rate(flops_per_second=1e14, is_whole=True, rollout_seconds=None, basis="measured")
    padded = replace(LONG, computed_tokens=9999)
    time = step_time(llama(), config, stage_of(config), shape=padded, rate=rate)
    assert time is not None
    assert time.total == pytest.approx(8 * 4096 * executed_flops_per_token(llama(), config, length=4096) / 1e14)


def test_no_rate_for_unknown_hardware_or_fp32_on_a_gpu() -> None:
    assert table_rate(config_of("hardware@cluster.hardware=unknown")) is None
    assert table_rate(config_of("model.dtype=float32")) is None
    assert table_rate(config_of("model.dtype=float32", "cluster=minicluster")) is not None


def test_rollouts_are_bound_by_reading_the_weights() -> None:
    words = ("pipeline=[sft,reward,grpo]", "hardware@cluster.hardware=h100", "launcher=torchrun")
    config = compose(["+experiment=llama3_8b_rlhf", *words])
    stage, rate = config.stages["grpo"], table_rate(config)
    assert isinstance(stage, TrainingStage) and rate is not None
    time = step_time(
        llama(), config, stage, shape=replace(LONG, tokens=500, computed_tokens=500, attended=500), rate=rate
    )
    assert time is not None and time.rollout > time.compute > 0
    weights_a_token = 2 * TOTAL / 3.35e12
    settings = stage.rollout  # type: ignore[attr-defined]
    steps = settings.prompts * settings.group_size * settings.passes // stage.batch.global_size
    assert time.rollout * steps >= settings.max_new_tokens * weights_a_token


# ---- rows ----------------------------------------------------------------------------------------


def test_padding_is_the_mean_of_the_longest_of_a_micro_batch() -> None:
    assert expected_longest([5], 3) == 5
    assert expected_longest([1, 3], 1) == 2
    assert expected_longest([1, 3], 2) == pytest.approx(0.25 * 1 + 0.75 * 3)
    facts = PreparedFacts(
        rows=2, units=2, tokens=4, trained_tokens=2, evaluation_rows=0, steps_per_epoch=1, row_lengths=(1, 3),
        document_lengths=(1, 3),
    )  # fmt: skip
    padded = shape_of(facts, micro_size=2, grouped=False)
    assert (padded.tokens, padded.computed_tokens, padded.attended) == (2, 2.5, 10 / 4)
    assert shape_of(facts, micro_size=2, grouped=True).computed_tokens == 2


def test_rows_are_guessed_from_the_size_of_the_files() -> None:
    assert guessed_shape(file_bytes=4000, rows=10, max_length=512, packed=False).tokens == 100
    assert guessed_shape(file_bytes=400_000, rows=10, max_length=512, packed=False).tokens == 512
    unknown = guessed_shape(file_bytes=0, rows=None, max_length=512, packed=False)
    assert (unknown.tokens, unknown.source) == (512, "longest")
    packed = guessed_shape(file_bytes=4000, rows=10, max_length=512, packed=True)
    assert (packed.computed_tokens, packed.attended) == (512, 100)


# ---- cost ----------------------------------------------------------------------------------------


def test_cost_by_hand() -> None:
    hardware = config_of("cluster.hardware.dollars_per_hour=2.5").cluster.hardware
    cost = cost_of(hardware, hours=10, devices=16)
    assert (cost.device_hours, cost.energy_kwh, cost.dollars) == (160, pytest.approx(112), 400)
    free = cost_of(config_of("cluster.hardware.watts=null").cluster.hardware, hours=10, devices=16)
    assert (free.energy_kwh, free.dollars) == (None, None)

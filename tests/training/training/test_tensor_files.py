"""Tensors in files, random states, and the judgement of losses: the parts of a checkpoint, each alone."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.config.training import FaultConfig
from orchestrator.distributed.random_state import random_state, seed_of, set_random_state
from orchestrator.errors import CheckpointError
from orchestrator.files.manifest import file_digest
from orchestrator.training.checkpointing.tensor_files import check_written, write_tensors
from orchestrator.training.faults import (
    HEALTHY,
    after_step,
    find_fault,
    health_from_json,
    must_go_back,
    reason_to_give_up,
)

FAULTS = FaultConfig(skips_before_rollback=2, max_skips=3, max_rollbacks=1, spike_sigma=3.0, spike_window=4)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    """The safetensors library reads what is written, for every type and for the odd shapes."""
    torch.manual_seed(0)
    tensors = {
        "uint8": torch.randint(0, 255, (5,), dtype=torch.uint8),
        "float32": torch.randn(3, 7),
        "bfloat16": torch.randn(3).to(torch.bfloat16),
        "float64": torch.randn(2, dtype=torch.float64),
        "int64": torch.tensor([2**40, -1]),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.5),
        "view": torch.randn(4, 6)[:, ::2],
        "large": torch.randn(3_000_000),
    }
    path = tmp_path / "a.safetensors"
    written = write_tensors(path, tensors, {"index": '{"ä": 1}'})
    assert (written.bytes, written.sha256) == (path.stat().st_size, file_digest(path))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"index": '{"ä": 1}'}


def test_a_file_that_changed_on_the_disk_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = write_tensors(path, {"a": torch.zeros(100)}, {})
    check_written(path, written)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="read back"):
        check_written(path, written)


def test_random_states_are_put_back() -> None:
    def draw() -> list[float]:
        numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
        return [*numbers, float(torch.rand(())), float(torch.randn(()))]

    random.gauss(0, 1)  # leaves a second number behind, as numpy's does
    np.random.randn()
    state = {key: tensor.clone() for key, tensor in random_state(torch.device("cpu")).items()}
    first = draw()
    assert draw() != first
    set_random_state(state, torch.device("cpu"))
    assert draw() == first


def test_every_rank_and_step_draws_for_itself() -> None:
    seeds = {seed_of(seed, step=step, rank=rank) for seed in (0, 1) for step in (4, 5, 40) for rank in range(8)}
    assert len(seeds) == 48 and max(seeds) < 2**32
    assert seed_of(0, step=4, rank=1) == seed_of(0, step=4, rank=1)


def test_a_fault_is_skipped_then_rolled_back_then_given_up() -> None:
    assert find_fault(HEALTHY, math.nan, FAULTS) == "the loss is nan"
    assert find_fault(HEALTHY, math.inf, FAULTS) == "the loss is inf"
    assert find_fault(HEALTHY, 1e9, FAULTS) is None, "too few losses to judge height by"
    one = after_step(HEALTHY, 7, loss=math.nan, fault="nan", settings=FAULTS)
    assert (one.streak, one.skipped, must_go_back(one, FAULTS)) == ((7,), 1, False)
    two = after_step(one, 8, loss=math.nan, fault="nan", settings=FAULTS)
    assert must_go_back(two, FAULTS) and reason_to_give_up(two, FAULTS) is None
    good = after_step(one, 8, loss=2.0, fault=None, settings=FAULTS)
    assert (good.streak, good.skipped, good.losses) == ((), 1, (2.0,))
    again = health_from_json({"streak": [7, 8], "skipped": 2, "omitted": [], "rollbacks": 1, "losses": []})
    assert "max_rollbacks is 1" in str(reason_to_give_up(again, FAULTS))
    many = health_from_json({"streak": [], "skipped": 2, "omitted": [3, 4], "rollbacks": 0, "losses": []})
    assert "4 updates were skipped, faults.max_skips is 3" in str(reason_to_give_up(many, FAULTS))


def test_a_spike_is_a_fault_where_a_threshold_is_set() -> None:
    health = HEALTHY
    for step, loss in enumerate((9.0, 2.0, 2.1, 1.9, 2.0), start=1):
        health = after_step(health, step, loss=loss, fault=None, settings=FAULTS)
    assert health.losses == (2.0, 2.1, 1.9, 2.0)
    assert find_fault(health, 2.2, FAULTS) is None  # mean 2 + 3 x 0.082 = 2.245
    assert find_fault(health, 2.3, FAULTS) == "the loss spiked to 2.3, over 2 + 3 x 0.082 = 2.245"


def test_a_step_that_a_rollback_left_out_counts_no_more() -> None:
    health = health_from_json({"streak": [], "skipped": 0, "omitted": [5], "rollbacks": 1, "losses": []})
    assert after_step(health, 5, loss=math.nan, fault="left out", settings=FAULTS) == health

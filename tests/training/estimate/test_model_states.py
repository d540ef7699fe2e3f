"""The forecast's weights, gradients and optimizer states against the tensors of two real gloo ranks, for every method and sharding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rank_runs

from orchestrator.architecture.read import read_architecture
from orchestrator.config.run import RunConfig
from orchestrator.estimate.model_states import state_memory
from orchestrator.files.atomic import read_json

METHODS = {"full": ("tuning=full",), "lora": ("tuning=lora",), "qlora": ("tuning=lora", "quantization=nf4")}
SHARDINGS = ("none", "zero1", "zero2", "zero3")
RANKS = 2
HIDDEN = 256
PARTS = ("weights", "gradients", "optimizer")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of all cells, measured in one set of ranks."""
    place = rank_runs.make_place(tmp_path_factory.mktemp("states"), hidden=HIDDEN)
    runs: dict[str, Path] = {}
    for method, words in METHODS.items():
        for sharding in SHARDINGS:
            name = f"{method}-{sharding}"
            zero = ("sharding.persistence_elements=0",) if sharding != "none" else ()
            runs[name] = place.make(name, *words, f"sharding={sharding}", "model.dtype=bfloat16", *zero, ranks=RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    program = Path(__file__).with_name("rank_memory.py")
    command = [sys.executable, *launcher, str(program), json.dumps([str(run) for run in runs.values()])]
    done = subprocess.run(
        command, env=rank_runs.environment(place), cwd=place.root, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return runs


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", METHODS)
def test_states_are_what_real_ranks_hold(measured: dict[str, Path], method: str, sharding: str) -> None:
    run = measured[f"{method}-{sharding}"]
    config = RunConfig.model_validate(read_json(run / "run.json")["config"], strict=False)
    model = read_architecture(run.parents[1] / "model")
    assert model is not None
    forecast = state_memory(model, config, config.stages["sft"])
    expected = {"weights": forecast.weights, "gradients": forecast.gradients, "optimizer": forecast.optimizer}
    ranks = [read_json(run / f"bytes-{rank}.json") for rank in range(RANKS)]
    mean = {part: sum(rank[part] for rank in ranks) / RANKS for part in PARTS}
    assert mean == pytest.approx(expected, rel=0.01)

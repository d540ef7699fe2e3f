"""The real worker on a real Slurm and under two torchrun agents: the same weights as on one machine, also after stops."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench import Bench, Done, make_bench
from launching import wait_until
from safetensors.torch import load_file
from slurm_cluster import Cluster, run

from launchers.submission import read_jobs
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows

STEPS = "stages.sft.max_steps=200"
"""Some seconds of a tiny model: a signal takes up to one until it is seen, in which a fast machine makes dozens of steps."""
SLURM = ("sharding=zero2", "launcher=slurm", "cluster=minicluster", STEPS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def local(bench: Bench) -> Done:
    """The same job as one node x 2 on this machine: what the others must equal."""
    done = bench.run("local", "sharding=zero2", "launcher=torchrun", "cluster.processes_per_node=2", STEPS)
    assert done.code == 0, done.told
    return done


@pytest.fixture
def no_hub(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ORCHESTRATOR_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, bench.environment()[name])
    yield


def assert_same_weights(one: Done, other: Done) -> None:
    left, right = (load_file(done.sft.root / "artifact" / "adapter_model.safetensors") for done in (one, other))
    assert left.keys() == right.keys() and len(left) > 0
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-6)


def render(bench: Bench, name: str, *words: str) -> Done:
    done = bench.run(name, *words, verb="render")
    assert done.code == 0, done.told
    done.sft.logs.mkdir(parents=True, exist_ok=True)
    return done


def step_of(done: Done) -> int:
    return max((int(row["step"]) for row in read_rows(done.sft.metrics) if "loss" in row), default=0)


@pytest.mark.usefixtures("no_hub")
def test_stopped_twice_on_two_nodes_it_ends_with_the_weights_of_one(
    cluster: Cluster, bench: Bench, local: Done
) -> None:
    done = render(bench, "cluster", *SLURM)
    job = run("sbatch", "--parsable", str(done.folder.root / "scripts" / "sft.sbatch"))
    for attempt in (1, 2):
        reached = step_of(done) + 6
        wait_until(lambda: step_of(done) >= reached, seconds=120, what=f"step {reached}")  # noqa: B023
        run("scancel", "--batch", "--signal=USR2", job)
        record = Path(done.sft.attempts, f"{attempt}.json")
        wait_until(record.exists, seconds=60, what=f"the end of attempt {attempt}")
    assert cluster.wait(job, seconds=180) == "COMPLETED"
    states = [read_json(done.sft.attempts / f"{attempt}.json")["state"] for attempt in (1, 2, 3)]
    assert states == ["stopped", "stopped", "finished"]
    assert read_jobs(done.sft.logs) == (job,)
    assert_same_weights(done, local)
    assert done.losses() == pytest.approx(local.losses(), rel=1e-5)


@pytest.mark.usefixtures("no_hub")
def test_two_torchrun_agents_agree_with_one_node(bench: Bench, local: Done) -> None:
    done = render(bench, "two", "sharding=zero2", "launcher=torchrun", "cluster.nodes=2", STEPS)
    script = str(done.folder.root / "scripts" / "sft.sh")
    quiet = {**os.environ, "LAUNCH_QUIET": "1"}
    both = [subprocess.Popen(["bash", script, str(rank), "localhost"], env=quiet) for rank in (1, 0)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert_same_weights(done, local)

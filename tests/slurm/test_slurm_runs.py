"""`launcher=slurm` as a user types it, on a real Slurm with the real worker: data prepared first, arrays of a multirun."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from alignment_runs import words_of, write_sets
from bench import Bench, Done, make_bench
from launching import wait_until
from slurm_cluster import Cluster, run

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows

SLURM = ("launcher=slurm", "cluster=minicluster", "cluster.nodes=1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def no_hub(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ORCHESTRATOR_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, bench.environment()[name])
    yield


def job_of(done: Done, stage: str) -> str:
    return read_json(done.folder.stage(stage).submission)["job"]


def facts_of(job: str) -> str:
    return run("scontrol", "show", "job", "-o", job)


def test_data_is_prepared_by_a_cpu_job_and_training_waits_for_it(cluster: Cluster, bench: Bench) -> None:
    gpus = ("cluster.gpu_request=gres", "cluster.gpus_per_node=1", "cluster.prepare.over_mib=0")
    done = bench.run("two_jobs", *SLURM, *gpus)
    assert done.code == 0, done.told
    preparing, training = job_of(done, "prepare"), job_of(done, "sft")
    assert f"Dependency=afterok:{preparing}" in facts_of(training)
    assert "TresPerNode=gres:gpu:1" in facts_of(training) and "TresPerNode" not in facts_of(preparing)
    assert cluster.wait(training, seconds=180) == "COMPLETED"
    assert cluster.state(preparing) == "COMPLETED"
    made = Path(read_json(done.sft.prepared)["train"])
    (log,) = done.folder.stage("prepare").logs.glob("slurm-*.log")
    assert made.name in log.read_text()
    trained = (done.sft.logs / "node-0.attempt-1.log").read_text()
    assert (
        re.search(r"preparing (\d|train|evaluation)", trained) is None
    )  # the phase is named, the rows were only mapped
    told = bench.run("two_jobs", verb="status", words=(str(done.folder.root),))
    assert [line.split()[1:3] for line in told.out.splitlines()[1:3]] == [["prepare", "finished"], ["sft", "finished"]]
    again = bench.run("another", *SLURM, *gpus, "stages.sft.max_steps=2")
    assert not again.folder.stage("prepare").root.exists(), "prepared data needs no job"
    assert cluster.wait(job_of(again, "sft"), seconds=180) == "COMPLETED"


def test_faulty_data_ends_the_preparation_and_the_training_never_starts(cluster: Cluster, bench: Bench) -> None:
    rows = bench.root / "long.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{n}", "completion": "{"word " * 900}"}}\n' for n in range(20)))
    done = bench.run(
        "faulty",
        *SLURM,
        "cluster.prepare.over_mib=0",
        f"stages.sft.data.train.path={rows}",
        "stages.sft.data.max_length=64",
    )
    assert done.code == 0, done.told
    assert cluster.wait(job_of(done, "prepare")) == "FAILED"
    assert cluster.wait(job_of(done, "sft")) == "CANCELLED"
    shown = bench.run("faulty", verb="logs", words=(str(done.folder.root), "--stage", "prepare"))
    assert "lose trained tokens to max_length=64" in shown.out, shown.told
    told = bench.run("faulty", verb="status", words=(str(done.folder.root),))
    assert "failed" in told.out and "was cancelled" in told.out


def test_prepare_as_a_job_of_its_own(cluster: Cluster, bench: Bench) -> None:
    words = (*SLURM, "stages.sft.data.max_length=400")
    done = bench.run("apart", *words, verb="prepare")
    assert done.code == 0 and not done.sft.submission.exists(), done.told
    trained = bench.run("apart", *words)
    assert f"Dependency=afterok:{job_of(done, 'prepare')}" in facts_of(job_of(trained, "sft"))
    assert cluster.wait(job_of(trained, "sft"), seconds=180) == "COMPLETED"
    assert cluster.state(job_of(done, "prepare")) == "COMPLETED"


def test_a_multirun_becomes_one_array(cluster: Cluster, bench: Bench) -> None:
    sweep = (
        "-m",
        *SLURM,
        "launcher.array=true",
        "launcher.array_max_running=1",
        "stages.sft.optimizer.lr=1e-3,1e-4,1e-5",
    )
    done = bench.run("sweep", *sweep, "cluster.prepare.over_mib=0", "stages.sft.data.max_length=300")
    assert done.code == 0, done.told
    runs = [
        Done(code=0, out="", error="", folder=type(done.folder)(bench.runs / f"sweep-lr_{lr}"))
        for lr in ("0.001", "0.0001", "1e-05")
    ]
    array = job_of(runs[0], "sft").split("_")[0]
    assert [job_of(one, "sft") for one in runs] == [f"{array}_{task}" for task in range(3)]
    assert [one.folder.stage("prepare").root.exists() for one in runs] == [True, False, False]
    assert f"afterok:{job_of(runs[0], 'prepare')}" in facts_of(array)
    for one in runs:
        assert cluster.wait(job_of(one, "sft"), seconds=240) == "COMPLETED"
    assert [read_json(one.folder.run)["config"]["stages"]["sft"]["optimizer"]["lr"] for one in runs] == [
        1e-3,
        1e-4,
        1e-5,
    ]
    assert len({one.losses()[-1] for one in runs}) == 3
    told = bench.run("sweep", verb="status", words=(str(bench.runs),))
    assert sum(line.startswith("sweep-lr") and "finished" in line for line in told.out.splitlines()) == 4
    again = bench.run("sweep", *sweep, "cluster.prepare.over_mib=0", "stages.sft.data.max_length=300")
    assert again.code == 0 and "finished or already submitted" in again.out, again.told


def test_a_pipeline_is_a_chain_that_survives_a_preemption(cluster: Cluster, bench: Bench) -> None:
    write_sets(bench.root)
    words = [
        *words_of(bench, "grpo", "chain", *SLURM, "cluster.partition=low"),
        "pipeline=[sft,reward,grpo]",
        f"stages.sft.data.train.path={bench.root / 'rows.jsonl'}",
        f"stages.sft.data.eval.path={bench.root / 'held_out.jsonl'}",
        "stages.sft.max_steps=2",
        f"stages.reward.data.train.path={bench.root / 'pairs.jsonl'}",
        f"stages.reward.data.eval.path={bench.root / 'pairs_held_out.jsonl'}",
        "stages.reward.max_steps=300",
        "stages.reward.checkpoint.every_steps=1000",
        "stages.grpo.accept_weak_reward=true",
        "stages.grpo.rewards=[{source: 'stage:reward', weight: 1.0, options: {}}]",
        "stages.grpo.max_steps=2",
    ]
    done = bench.run("chain", words=words)
    assert done.code == 0, done.told
    jobs = [job_of(done, stage) for stage in ("sft", "reward", "grpo")]
    assert [f"Dependency=afterok:{before}" in facts_of(job) for before, job in pairwise(jobs)] == [True, True]
    reward = done.folder.stage("reward")
    wait_until(lambda: sum("loss" in row for row in read_rows(reward.metrics)) > 2, seconds=180, what="reward's steps")
    run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.wait(jobs[2], seconds=300) == "COMPLETED"
    assert [cluster.state(job) for job in jobs] == ["COMPLETED"] * 3
    states = [read_json(file)["state"] for file in sorted(reward.attempts.glob("[0-9].json"))]
    assert states == ["stopped", "finished"]
    written = [int(str(row["step"])) for row in read_rows(reward.metrics) if "loss" in row]
    assert written == list(range(1, 301))
    assert read_json(done.folder.stage("grpo").result)["inputs"].keys() == {"sft", "reward"}
    assert run("squeue", "--noheader") == ""

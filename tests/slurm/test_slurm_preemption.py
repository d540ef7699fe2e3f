"""The whole preemption loop with the real worker: preempted three times, once over its time limit, done by itself."""

from pathlib import Path

import pytest
from bench import Bench, make_bench
from launching import wait_until
from slurm_cluster import Cluster, run
from wandb_files import offline_files, offline_history, records

from launchers.submission import read_jobs
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.metrics.wandb.process import run_id

STEPS = 700
"""Enough for half a minute and more after the fourth start on any machine that was seen; where it is not, there is no fifth."""
WORDS = (
    "launcher=slurm",
    "cluster=minicluster",
    "cluster.partition=low",
    "sharding=none",
    "tracking=wandb",
    "tracking.mode=offline",
    f"stages.sft.max_steps={STEPS}",
    "stages.sft.checkpoint.every_steps=1000",
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = make_bench(tmp_path, hidden=64)
    for name in ("ORCHESTRATOR_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, bench.environment()[name])
    return bench


def test_preempted_three_times_and_over_its_time_limit_it_ends_by_itself(cluster: Cluster, bench: Bench) -> None:
    done = bench.run("loop", *WORDS)
    assert done.code == 0, done.told
    job = read_json(done.sft.submission)["job"]

    def steps_of(attempt: int) -> list[int]:
        rows = [row for row in read_rows(done.sft.metrics) if "loss" in row]
        return [int(str(row["step"])) for row in rows if row["attempt"] == attempt]

    def evidence() -> str:
        logs = sorted(done.sft.logs.glob("*.log"))
        return "\n".join([run("squeue"), *(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)])

    for attempt in (1, 2, 3, 4):
        started = f"three steps of attempt {attempt}"
        wait_until(lambda: len(steps_of(attempt)) > 2, seconds=300, what=started, evidence=evidence)  # noqa: B023
        if attempt < 4:
            take_all = ("--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null")
            run("sbatch", *take_all, "--wrap=sleep 1")
        else:  # a minute is less than the lead time: Slurm warns at its next look, within half a minute
            run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        wait_until(done.sft.attempt(attempt).exists, seconds=90, what=f"the end of attempt {attempt}")
    if not done.sft.result.exists():
        run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.wait(job, seconds=420) == "COMPLETED"
    count = len(list(done.sft.attempts.glob("[0-9].json")))
    attempts = [read_json(done.sft.attempt(number)) for number in range(1, count + 1)]
    assert count >= 4, attempts
    assert [attempt["state"] for attempt in attempts] == ["stopped"] * (count - 1) + ["finished"], attempts
    assert read_jobs(done.sft.logs) == (job,)
    assert read_json(done.sft.result)["steps"] == STEPS
    written = [int(str(row["step"])) for row in read_rows(done.sft.metrics) if "loss" in row]
    assert written == list(range(1, STEPS + 1)), "no step is missing, none twice"
    assert all(steps_of(attempt) for attempt in range(1, count + 1))
    files = offline_files(done.sft.wandb)
    assert len(files) == count + 1, "one for each attempt, and one for the proof, which fresh ranks make"
    ids = {record.run.run_id for file in files for record in records(file) if record.HasField("run")}
    assert ids == {run_id(done.sft.wandb)}
    assert [row["_step"] for row in offline_history(done.sft.wandb) if "loss" in row] == written

"""Jobs on a real Slurm: they start, save, go on, fail, are cancelled, and say so. The worker is a stand-in."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import begun, make_slurm_spec, read_seen, wait_until
from slurm_cluster import Cluster, run

from launchers import sbatch
from launchers.cancellation import cancel_jobs
from launchers.causes import read_first_cause
from launchers.spec import JobSpec, write
from launchers.submission import Stage, read_jobs, submit_chain
from slurm.client import ask_to_stop, cancel
from slurm.query import query

LONG = {"steps": 100_000, "step_seconds": 0.1}


def steps_of(spec: JobSpec, rank: int = 0) -> list[int]:
    return [int(line.split()[1]) for line in Path(spec.stage_directory, f"steps.rank-{rank}").read_text().splitlines()]


def attempts_of(spec: JobSpec) -> dict[int, str]:
    files = Path(spec.attempts_directory).glob("*.json")
    return {int(file.stem): json.loads(file.read_text())["state"] for file in sorted(files)}


def log_of(spec: JobSpec) -> str:
    return "".join(path.read_text() for path in sorted(Path(spec.log_directory).glob("slurm-*.log")))


def test_two_nodes_meet_and_finish(cluster: Cluster, tmp_path: Path) -> None:
    settings = {"show": ["PYTHONSAFEPATH", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "WANDB_API_KEY", "SBATCH_COMMENT"]}
    spec = make_slurm_spec(tmp_path, settings=settings, processes_per_node=2)
    job = cluster.submit(spec)
    assert cluster.wait(job) == "COMPLETED"
    seen = [read_seen(spec, rank=rank) for rank in range(4)]
    assert [one["environment"]["WORLD_SIZE"] for one in seen] == ["4"] * 4
    assert {one["host"] for one in seen} == {"node1", "node2"}
    assert seen[0]["environment"]["PYTHONSAFEPATH"] == "1" and seen[0]["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert seen[0]["environment"]["OMP_NUM_THREADS"] == "1" and seen[0]["folder"] == str(tmp_path)
    assert attempts_of(spec) == {1: "finished"} and read_jobs(spec.log_directory) == (job,)
    logs = [Path(spec.log_directory, f"node-{node}.attempt-1.log").read_text() for node in (0, 1)]
    assert sorted(line for log in logs for line in log.splitlines() if line.startswith("rank")) == [
        f"rank {rank} begins attempt 1" for rank in range(4)
    ]
    again = cluster.submit(spec)
    assert cluster.wait(again) == "COMPLETED" and "nothing to do" in log_of(spec)


def test_secrets_reach_the_ranks_but_not_slurm(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very secret")
    monkeypatch.setenv("SBATCH_PARTITION", "no-such-partition")
    spec = make_slurm_spec(
        tmp_path, settings={"show": ["WANDB_API_KEY"]}, nodes=1, secrets_file=str(tmp_path / "keys.sh")
    )
    job = cluster.submit(spec)
    assert cluster.wait(job) == "COMPLETED"
    assert read_seen(spec)["environment"]["WANDB_API_KEY"] == "very secret"
    told = run("scontrol", "show", "job", job) + run("scontrol", "write", "batch_script", job, "-")
    assert "very secret" not in told + Path(spec.script_path).read_text()


def test_a_site_without_requeue_gets_a_successor_and_the_chain_follows_it(cluster: Cluster, tmp_path: Path) -> None:
    first = make_slurm_spec(tmp_path / "a", settings={"steps": 60}, nodes=1, cluster={"requeue": False})
    second = make_slurm_spec(tmp_path / "b", nodes=1)
    stages = [Stage(spec, sbatch.render(spec), f"token-{time.time_ns()}") for spec in (first, second)]
    recorded: list[str] = []
    jobs = submit_chain(stages, record=lambda _stage, job: recorded.append(job))
    assert tuple(recorded) == jobs
    wait_until(begun(first), seconds=30, what="the first step")
    ask_to_stop([jobs[0]])
    assert cluster.wait(jobs[1], seconds=90) == "COMPLETED"
    successor = read_jobs(first.log_directory)[-1]
    assert read_jobs(first.log_directory) == (jobs[0], successor) and successor not in jobs
    assert [cluster.state(job) for job in (jobs[0], successor)] == ["FAILED", "COMPLETED"]
    assert attempts_of(first) == {1: "stopped", 2: "finished"} and steps_of(first) == list(range(1, 61))


def test_when_the_first_stage_fails_nothing_stays_pending(cluster: Cluster, tmp_path: Path) -> None:
    faults = {"1:0": {"step": 2, "exit": 93}}
    first = make_slurm_spec(tmp_path / "a", settings={"faults": faults, "obeys_term": True}, nodes=1)
    others = [make_slurm_spec(tmp_path / name, nodes=1) for name in ("b", "c")]
    stages = [Stage(spec, sbatch.render(spec), f"token-{time.time_ns()}") for spec in (first, *others)]
    jobs = submit_chain(stages, record=lambda _stage, _job: None)
    assert cluster.wait(jobs[0]) == "FAILED"
    wait_until(lambda: not run("squeue", "--noheader"), seconds=30, what="an empty queue")
    assert [cluster.state(job) for job in jobs[1:]] == ["CANCELLED", "CANCELLED"]
    assert attempts_of(first) == {1: "failed"}
    assert query([jobs[0]])[jobs[0]].sentence == "ended with a nonzero exit code"


def test_one_dead_rank_ends_the_job_within_30_s_and_is_named(cluster: Cluster, tmp_path: Path) -> None:
    faults = {"1:3": {"step": 5, "signal": 9}}
    site = {"max_failures": 0}
    spec = make_slurm_spec(tmp_path, settings=LONG | {"faults": faults}, processes_per_node=2, cluster=site)
    job = cluster.submit(spec)
    wait_until(begun(spec), seconds=30, what="the first steps")
    start = time.monotonic()
    assert cluster.wait(job) == "FAILED"
    assert time.monotonic() - start < 30
    cause = read_first_cause(spec.log_directory, 1)
    assert cause is not None and (cause.rank, cause.signal) == (3, "SIGKILL")
    assert cause.host == read_seen(spec, rank=3)["host"]
    assert "not started again: max_failures is 0" in log_of(spec)


def test_failures_are_tried_again_within_their_budget(cluster: Cluster, tmp_path: Path) -> None:
    faults = {f"{attempt}:0": {"step": 2, "exit": 5} for attempt in range(1, 9)}
    settings = LONG | {"faults": faults, "obeys_term": True}
    spec = make_slurm_spec(tmp_path, settings=settings, nodes=1, cluster={"max_failures": 1})
    assert cluster.wait(cluster.submit(spec), seconds=90) == "FAILED"
    assert attempts_of(spec) == {1: "failed", 2: "failed"}
    assert "not started again: max_failures is 1, and this was number 2" in log_of(spec)


@pytest.mark.parametrize("gently", [True, False])
def test_a_cancelled_job_does_not_come_back(cluster: Cluster, tmp_path: Path, gently: bool) -> None:
    spec = make_slurm_spec(tmp_path, settings=LONG)
    job = cluster.submit(spec)
    wait_until(begun(spec), seconds=30, what="the first step")
    if gently:
        facts = cancel_jobs([spec], gentle_seconds=30)
        assert facts[job].state.name == "FAILED"  # exit code 75: saved, and wants to go on
    else:
        cancel([job])
        assert cluster.wait(job) == "CANCELLED"
    assert attempts_of(spec) == {1: "stopped"}
    time.sleep(8)  # a requeued job would be eligible again after six
    assert run("squeue", "--noheader") == ""
    assert read_jobs(spec.log_directory) == (job,)


def test_a_pending_chain_is_cancelled_as_a_whole(cluster: Cluster, tmp_path: Path) -> None:
    specs = [make_slurm_spec(tmp_path / name, nodes=3, cluster={"cpus_per_task": 8}) for name in ("a", "b", "c")]
    blocker = run("sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    cluster.wait(blocker, wanted="RUNNING")
    stages = [Stage(spec, sbatch.render(spec), f"token-{time.time_ns()}") for spec in specs]
    jobs = submit_chain(stages, record=lambda _stage, _job: None)
    reasons = {"its turn", "comes first", "stage before"}
    assert all(any(reason in fact.sentence for reason in reasons) for fact in query(jobs).values())
    facts = cancel_jobs(specs, also=jobs, gentle_seconds=30)
    assert [facts[job].state.name for job in jobs] == ["CANCELLED"] * 3


@pytest.mark.parametrize("how", ["power off", "freeze"])
def test_a_lost_node_is_survived(cluster: Cluster, tmp_path: Path, how: str) -> None:
    spec = make_slurm_spec(tmp_path, settings={"steps": 100, "in_step": True})
    job = cluster.submit(spec)
    wait_until(begun(spec), seconds=30, what="the first step")
    if how == "power off":
        cluster.manage("power-off", "node1")
    else:
        cluster.signal_node("node2", signal.SIGSTOP)
    try:
        wait_until(lambda: Path(spec.log_directory, "attempt-2").exists(), seconds=90, what="the second attempt")
        if how == "freeze":
            cluster.signal_node("node2", signal.SIGCONT)
        assert cluster.wait(job, seconds=90) == "COMPLETED"
    finally:
        cluster.signal_node("node2", signal.SIGCONT)
        cluster.manage("power-on", "node1")
        wait_until(lambda: "down" not in run("sinfo", "-h", "-N", "-o", "%T"), seconds=60, what="all nodes are back")
    assert attempts_of(spec) == {1: "failed", 2: "finished"}
    lost = {"power off": "node1", "freeze": "node2"}[how]
    assert lost not in {read_seen(spec, rank=rank, attempt=2)["host"] for rank in (0, 1)}
    for rank in (0, 1):  # nothing of the lost attempt works on after the next one has begun
        lines = Path(spec.stage_directory, f"steps.rank-{rank}").read_text().splitlines()
        attempts = [int(line.split()[0]) for line in lines]
        assert attempts == sorted(attempts) and set(attempts) == {1, 2}


def test_a_frozen_controller_gets_one_job_only(cluster: Cluster, tmp_path: Path) -> None:
    spec = make_slurm_spec(tmp_path, nodes=1)
    controller = cluster.controller()
    thaw = subprocess.Popen(["bash", "-c", f"kill -STOP {controller}; sleep 15; kill -CONT {controller}"])
    time.sleep(0.5)
    job = cluster.submit(spec)
    thaw.wait()
    assert cluster.wait(job) == "COMPLETED"
    assert run("squeue", "--noheader", "--states=all", "--name=demo-sft", "--format=%i").split().count(job) == 1
    newer = [one for one in run("squeue", "--noheader", "--states=all", "--format=%i").split() if int(one) > int(job)]
    assert newer == []


def test_a_restarted_controller_does_not_disturb_the_run(cluster: Cluster, tmp_path: Path) -> None:
    spec = make_slurm_spec(tmp_path, settings={"steps": 80})
    job = cluster.submit(spec)
    wait_until(begun(spec), seconds=30, what="the first step")
    controller = cluster.controller()
    os.kill(controller, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{controller}").exists(), seconds=20, what="the end of the controller")
    assert query([job])[job].state.name == "UNKNOWN"
    cluster.start()
    assert cluster.wait(job, seconds=90) == "COMPLETED"
    assert attempts_of(spec) == {1: "finished"}


def test_a_missing_log_folder_is_made_or_explained(cluster: Cluster, tmp_path: Path) -> None:
    spec = make_slurm_spec(tmp_path, nodes=1)
    path = write(sbatch.render(spec))
    job = run("sbatch", "--parsable", str(path))
    assert cluster.wait(job) == "FAILED"
    assert "ExitCode=0:53" in run("scontrol", "show", "job", "-o", job)
    assert "the log folder may be missing" in query([job])[job].sentence
    assert cluster.wait(cluster.submit(spec)) == "COMPLETED"


def test_hostile_names_and_values_pass_through_a_real_cluster(cluster: Cluster, tmp_path: Path) -> None:
    words = ("a\nb", "$$ ${local_rank}", "", 'it\'s "x" `id` $(id)', "%j", "-x", "--node", "-h", "--")
    run_folder = tmp_path / 'it\'s "x" $(id) %j ü;&'
    name = 'it\'s "x" $(id) %j ü #;&'
    plain = make_slurm_spec(run_folder)
    spec = make_slurm_spec(
        run_folder,
        settings={"show": ["VALUE"]},
        name=name,
        command=(*plain.command, *words),
        environment={"VALUE": "a\nb $HOME ,x=1"},
    )
    job = cluster.submit(spec)
    assert cluster.wait(job) == "COMPLETED"
    seen = read_seen(spec)
    assert tuple(seen["argv"][2:-2]) == words
    assert seen["environment"]["VALUE"] == "a\nb $HOME ,x=1" and seen["folder"] == str(run_folder)
    assert run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%j") == name
    assert Path(spec.log_directory, f"slurm-{job}.log").exists()
    assert Path(spec.log_directory, "node-1.attempt-1.log").exists()


def test_an_array_runs_each_task_as_its_own_run(cluster: Cluster, tmp_path: Path) -> None:
    specs = [make_slurm_spec(tmp_path / str(task), nodes=1, settings={"steps": 20}) for task in range(3)]
    for spec in specs:
        write(sbatch.render(spec))
    logs = tmp_path / "logs"
    logs.mkdir()
    script = sbatch.render_array(
        specs, name="sweep", path=str(tmp_path / "sweep.sbatch"), log_directory=str(logs), max_running=2
    )
    job = run("sbatch", "--parsable", str(write(script)))
    tasks = [f"{job}_{task}" for task in range(3)]
    for task in tasks:
        assert cluster.wait(task, seconds=90) == "COMPLETED"
    assert [attempts_of(spec) for spec in specs] == [{1: "finished"}] * 3
    assert sorted(path.name for path in logs.iterdir()) == [f"slurm-{task}.log" for task in tasks]
    ports = {read_seen(spec)["environment"]["MASTER_PORT"] for spec in specs}
    assert len(ports) == 3

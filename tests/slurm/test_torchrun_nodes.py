"""The torchrun script with the real torchrun: one node, two nodes on this machine, mistakes of whoever starts it."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import forking
import pytest
from launching import begun, make_spec, read_seen, wait_for_outcome, wait_until

from launchers import torchrun
from launchers.causes import read_first_cause
from launchers.process import launch
from launchers.spec import JobSpec, write

LONG = {"steps": 100_000, "step_seconds": 0.1}


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun without its imports."""
    for name, value in forking.environment().items():
        monkeypatch.setenv(name, value)


def start(spec: JobSpec, rank: int, *more: str, **environment: str) -> subprocess.Popen[str]:
    path = write(torchrun.render(spec))
    facts = {**os.environ, "LAUNCH_QUIET": "1", **environment}
    argv = ["bash", str(path), str(rank), *more]
    return subprocess.Popen(argv, env=facts, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def interrupt_twice(*processes: subprocess.Popen[str]) -> None:
    """What an impatient person does; everything ends."""
    for _ in range(2):
        for process in processes:
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    assert all(end(process, 90)[0] == 1 for process in processes)


def test_one_node_runs_every_rank_and_a_dead_one_ends_the_others(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings=LONG | {"faults": {"1:1": {"step": 3, "exit": 5, "message": "ValueError: x"}}})
    begin = time.monotonic()
    outcome = wait_for_outcome(launch(torchrun.render(spec), spec))
    assert time.monotonic() - begin < 40
    assert outcome.exit_code == 1 and outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.exit_code, outcome.cause.message) == (1, 5, "ValueError: x")
    assert read_seen(spec, rank=1)["environment"]["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_nodes_meet_in_any_order_and_end_together(tmp_path: Path, order: tuple[int, int]) -> None:
    spec = make_spec(tmp_path, nodes=2)
    processes: dict[int, subprocess.Popen[str]] = {}
    for rank in order:
        processes[rank] = start(spec, rank)
        time.sleep(1)
    assert [end(processes[rank])[0] for rank in (0, 1)] == [0, 0]
    seen = [read_seen(spec, rank=rank)["environment"] for rank in range(4)]
    assert [one["WORLD_SIZE"] for one in seen] == ["4"] * 4
    assert sorted(one["LOCAL_RANK"] for one in seen) == ["0", "0", "1", "1"]
    assert sorted(path.name for path in Path(spec.log_directory).glob("node-*")) == [
        "node-0.attempt-1.log",
        "node-1.attempt-1.log",
    ]
    assert Path(spec.stage_directory, "decisions").read_text() == "1 0\n"  # node 0 judged, once


def test_an_interrupt_at_node_0_saves_on_both_and_the_next_start_goes_on(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings={"steps": 60}, nodes=2, processes_per_node=1)
    both = [start(spec, rank, "localhost") for rank in (0, 1)]
    wait_until(begun(spec), seconds=60, what="the first steps")
    os.killpg(both[0].pid, signal.SIGINT)  # as a terminal does: to the foreground process group
    assert [end(process)[0] for process in both] == [75, 75]
    both = [start(spec, rank, "localhost") for rank in (1, 0)]
    assert [end(process)[0] for process in both] == [0, 0]
    assert Path(spec.stage_directory, "decisions").read_text() == "1 0\n2 0\n"


def test_a_dead_rank_ends_the_other_node_within_30_s(tmp_path: Path) -> None:
    faults: dict[str, Any] = {"1:1": {"step": 3, "signal": 9}}
    spec = make_spec(tmp_path, settings=LONG | {"faults": faults}, nodes=2, processes_per_node=1)
    both = [start(spec, rank) for rank in (0, 1)]
    wait_until(Path(spec.log_directory, "attempt-1", "failure.json").exists, seconds=60, what="the death")
    begin = time.monotonic()
    assert [end(process)[0] for process in both] == [1, 1]
    assert time.monotonic() - begin < 30
    cause = read_first_cause(spec.log_directory, 1)
    assert cause is not None and (cause.rank, cause.signal) == (1, "SIGKILL")


def test_a_node_rank_given_twice_is_named_at_once(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings=LONG, nodes=3, processes_per_node=1)
    head, first = start(spec, 0), start(spec, 1)
    wait_until(Path(spec.log_directory, "attempt-1", "node-1").exists, seconds=60, what="node 1")
    code, errors = end(start(spec, 1))
    assert code == 3 and "node rank 1 of attempt 1 is taken by" in errors
    interrupt_twice(head, first)


def test_a_missing_node_is_named_within_a_minute(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings=LONG, nodes=2, processes_per_node=1)
    head = start(spec, 0)
    assert head.stderr is not None
    begin = time.monotonic()
    lines = iter(head.stderr.readline, "")
    line = next(line for line in lines if "still waiting" in line)
    assert time.monotonic() - begin < 60
    assert "still waiting for node 1 of 0..1" in line
    interrupt_twice(head)


def test_launch_all_starts_every_node_over_ssh(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "it's a $(run)", nodes=2, processes_per_node=1)
    write(torchrun.render(spec))
    script = write(torchrun.render_launch_all(spec))
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/usr/bin/env bash\necho "$2" >>"$(dirname "$0")/hosts"\nexec sh -c "$3"\n')
    ssh.chmod(0o755)
    environment = {**os.environ, "SSH": str(ssh)}
    done = subprocess.run(["bash", script, "localhost", "other"], env=environment, timeout=90, check=False)
    assert done.returncode == 0
    assert sorted((tmp_path / "hosts").read_text().split()) == ["localhost", "other"]
    few = subprocess.run(["bash", script, "one"], capture_output=True, text=True, check=False)
    assert few.returncode == 3 and "2 host names are needed" in few.stderr

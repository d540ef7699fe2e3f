"""The guard beside a rank: names the first death, ends the others, turns a preemption into the stop file."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from launching import wait_until

from launchers.causes import Cause, read_first_cause
from launchers.guard import Settings, record_failure

SLEEP = (sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)")


def start_guard(state: Path, *argv: str, node: int = 0, nodes: int = 1, silence: float = 60) -> subprocess.Popen[bytes]:
    options = [
        "--state",
        str(state),
        "--stop-file",
        str(state / "STOP"),
        "--nodes",
        str(nodes),
        "--watch",
        "--node",
        str(node),
    ]
    options += ["--grace-seconds", "0.5", "--silence-seconds", str(silence)]
    facts = {"RANK": str(node), "LOCAL_RANK": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "launchers.guard", *options, "--", *(argv or SLEEP)],
        env={**os.environ, **facts},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def wait_ready(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdout is not None and guard.stdout.readline() == b"ready\n"


def state_of(folder: Path, attempt: int = 1) -> Path:
    state = folder / f"attempt-{attempt}"
    state.mkdir()
    return state


def cause_of(folder: Path) -> Cause:
    cause = read_first_cause(folder, 1)
    assert cause is not None
    return cause


@pytest.mark.parametrize(("code", "returned"), [(0, 0), (75, 75)])
def test_a_good_end_leaves_no_failure(tmp_path: Path, code: int, returned: int) -> None:
    state = state_of(tmp_path)
    guard = start_guard(state, sys.executable, "-c", f"raise SystemExit({code})")
    assert guard.wait(20) == returned
    assert read_first_cause(tmp_path, 1) is None


def test_a_rank_with_work_left_for_a_fresh_process_is_started_again(tmp_path: Path) -> None:
    state, seen = state_of(tmp_path), tmp_path / "starts"
    program = f"import os; open({str(seen)!r}, 'a').write(os.environ['LAUNCH_START']); raise SystemExit([76, 75][len(open({str(seen)!r}).read()) - 1])"
    assert start_guard(state, sys.executable, "-c", program).wait(20) == 75
    assert seen.read_text() == "12" and read_first_cause(tmp_path, 1) is None


def test_a_signal_is_named_and_returned_as_a_shell_does(tmp_path: Path) -> None:
    guard = start_guard(state_of(tmp_path), sys.executable, "-c", "import os; os.kill(os.getpid(), 11)")
    assert guard.wait(20) == 139
    assert (cause_of(tmp_path).signal, cause_of(tmp_path).shell_exit_code) == ("SIGSEGV", 139)
    told = subprocess.run(
        [sys.executable, "-m", "launchers.causes", str(tmp_path), "1"], capture_output=True, text=True, check=True
    )
    assert told.stdout == f"139\nrank 0 on {os.uname().nodename} was killed by SIGSEGV\n"


def test_a_preemption_becomes_the_stop_file_and_the_rank_lives(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    guard = start_guard(state)
    wait_ready(guard)
    os.killpg(guard.pid, signal.SIGTERM)
    wait_until((state / "STOP").exists, seconds=5, what="the stop file")
    assert (state / "STOP").read_text() == "signal TERM\n"
    assert guard.poll() is None
    (state / "failure.json").write_text("{}")
    assert guard.wait(10) == 128 + signal.SIGKILL  # the rank ignores TERM, so it took the grace time


def test_a_signal_to_a_superseded_attempt_does_not_stop_the_next_one(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    guard = start_guard(state)
    wait_ready(guard)
    state_of(tmp_path, 2)
    os.kill(guard.pid, signal.SIGTERM)
    (state / "failure.json").write_text("{}")
    assert guard.wait(10) != 0
    assert not (state / "STOP").exists()


def test_a_frozen_node_is_named_and_the_others_end(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    guards = [start_guard(state, node=node, nodes=2, silence=2) for node in (0, 1)]
    for guard in guards:
        wait_ready(guard)
    wait_until((state / "node-1.alive").exists, seconds=5, what="a beat")
    os.kill(guards[1].pid, signal.SIGSTOP)
    assert guards[0].wait(30) != 0
    assert "node 1 (" in str(cause_of(tmp_path)) and "sent no heartbeat for" in str(cause_of(tmp_path))
    state_of(tmp_path, 2)  # another attempt has begun: the thawed node must not save
    os.kill(guards[1].pid, signal.SIGCONT)
    assert guards[1].wait(10) == 128 + signal.SIGKILL
    assert not (state / "STOP").exists()


def test_a_node_that_never_came_is_named(tmp_path: Path) -> None:
    guard = start_guard(state_of(tmp_path), node=0, nodes=2, silence=1)
    assert guard.wait(30) != 0
    assert str(cause_of(tmp_path)) == "node 1 never sent a heartbeat"


def test_a_rank_does_not_outlive_its_launcher(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    guard = f"{sys.executable} -m launchers.guard --state {state} --stop-file {state}/STOP --nodes 1 --node 0 --grace-seconds 0.5"
    launcher = subprocess.Popen(["bash", "-c", f"{guard} -- sleep 600 & echo $!; wait"], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    process = int(launcher.stdout.readline())
    wait_until((state / "node-0.alive").exists, seconds=10, what="a beat")
    launcher.kill()
    launcher.wait()
    wait_until((state / "failure.json").exists, seconds=10, what="the failure")
    assert str(cause_of(tmp_path)) == "the launcher of this rank died"
    stat = Path(f"/proc/{process}/stat")
    wait_until(lambda: not stat.exists() or " Z " in stat.read_text(), seconds=10, what="the end of the guard")


def test_the_first_of_many_failures_counts_and_is_whole(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    first = Settings(
        state=state, stop_file=state / "STOP", nodes=1, watch=True, rank=0, node=0, grace_seconds=1, silence_seconds=1
    )
    threads = [
        threading.Thread(
            target=record_failure, args=(replace(first, rank=rank),), kwargs={"exit_code": 5, "message": "x"}
        )
        for rank in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = json.loads((state / "failure.json").read_text())
    assert content["exit_code"] == 5 and 0 <= content["rank"] < 16
    assert [path.name for path in state.iterdir()] == ["failure.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"rank": "x"}', "{"])
def test_an_unreadable_failure_is_no_cause(tmp_path: Path, content: str) -> None:
    (state_of(tmp_path) / "failure.json").write_text(content)
    assert read_first_cause(tmp_path, 1) is None
    assert read_first_cause(tmp_path, 7) is None


def test_without_a_guard_the_last_error_of_the_logs_is_the_cause(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "launchers.causes", str(tmp_path), "1"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == ""
    (tmp_path / "node-0.attempt-1.log").write_text("all is well\n")
    (tmp_path / "node-1.attempt-1.log").write_text("Traceback\nKeyError: 1\nValueError: no  such thing\nlast words\n")
    told = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert told.stdout == "\nnode-1.attempt-1.log: ValueError: no such thing\n"

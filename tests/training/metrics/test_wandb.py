"""W&B for real: the SDK, its offline files read back, and a server on the loopback; restarts, kills, dead and silent servers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from wandb_files import offline_files, offline_history, records
from wandb_server import FAKE_KEY, WandbServer, unreachable, wandb_server

from orchestrator.metrics.jsonl import RecordFile
from orchestrator.metrics.wandb.process import WandbProcess, finish, run_id, start
from orchestrator.metrics.wandb.protocol import Outcome, WandbSettings, how_to_see, read_state

ROOT = Path(__file__).resolve().parents[3]
ALL = list(range(1, 31))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no netrc, no settings of the person who runs the tests; nothing that leaves the machine."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """The server, with a key for it in the environment."""
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        yield running


def settings_of(stage: Path, *, mode: Any = "auto") -> WandbSettings:
    stage.mkdir(parents=True, exist_ok=True)
    return WandbSettings(
        project="tests", entity="tester", mode=mode, name="tiny-sft", group="tiny", job_type="sft",
        config={"model": {"base": "tiny"}, "lr": 1e-4}, metrics_file=str(stage / "metrics.jsonl"), samples_file=str(stage / "samples.jsonl"), profile_folder=str(stage / "profile"),
        directory=str(stage / "wandb"), init_timeout_seconds=3, finish_timeout_seconds=15,
    )  # fmt: skip


def begin(stage: Path, *, mode: Any = "auto") -> WandbProcess:
    run = start(settings_of(stage, mode=mode))
    assert run is not None
    return run


def append(stage: Path, first: int, last: int, *, attempt: int, pause: float = 0.0) -> None:
    """What a trainer writes: a row each step, an evaluation every fifth, and one loss that is not a number."""
    with RecordFile(stage / "metrics.jsonl") as record:
        for step in range(first, last + 1):
            loss = float("nan") if step == 7 else 1 / step
            record.append({"step": step, "attempt": attempt, "epoch": 0.1, "loss": loss, "lr": 1e-4, "mfu": None})
            if step % 5 == 0:
                record.append({"step": step, "attempt": attempt, "eval_loss": 2 / step})
            time.sleep(pause)


def attempt(stage: Path, first: int, last: int, *, number: int, outcome: Outcome = "finished") -> str:
    """One whole attempt of a worker; gives the sentence that it ends with."""
    run = begin(stage)
    append(stage, first, last, attempt=number)
    return finish(run, {"best_eval_loss": 0.5}, outcome=outcome, timeout_seconds=60)


def wait_for(condition: Any, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def assert_history(rows: list[dict[str, Any]]) -> None:
    """Each step once, in order, its evaluation with it."""
    assert [row["_step"] for row in rows] == ALL
    assert [row["_step"] for row in rows if "eval_loss" in row] == [5, 10, 15, 20, 25, 30]
    assert all(row["eval_loss"] == 2 / row["_step"] for row in rows if "eval_loss" in row)
    assert [row["_step"] for row in rows if math.isnan(float(row["loss"]))] == [7]
    assert not any("mfu" in row for row in rows)


def write_samples(stage: Path, step: int, *, attempt: int, completion: str) -> None:
    with RecordFile(stage / "samples.jsonl") as record:
        for reward in (0.25, 0.75):
            row = {"prompt": "Say red", "completion": completion, "reward": reward, "rewards": {"exact": reward}}
            record.append({"step": step, "attempt": attempt, **row})


def tables(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What history tells of the tables, by step: as an object, or key by key."""
    told = {row["_step"]: row.get("samples", {}) | _below(row, "samples.") for row in rows}
    return {step: table for step, table in told.items() if table}


def _below(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


# ---- offline -------------------------------------------------------------------------------------------


def test_traces_of_a_profile_become_files_of_the_run(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "sft"
    (stage / "profile").mkdir(parents=True)
    (stage / "profile" / "attempt-1.rank-0.breakdown.json").write_text('{"steps": 3}')
    attempt(stage, 1, 3, number=1)
    (file,) = (stage / "wandb").glob("offline-run-*/files/profile/*.json")
    assert file.read_text() == '{"steps": 3}'


def test_offline_by_itself_and_each_step_once_over_a_restart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "run" / "sft"
    attempt(stage, 1, 15, number=1, outcome="stopped")
    sentence = attempt(stage, 11, 30, number=2)
    assert sentence == f"W&B run is offline; send it with: wandb sync {stage / 'wandb'}"
    assert len(offline_files(stage / "wandb")) == 2
    assert_history(offline_history(stage / "wandb"))
    written = [record for path in offline_files(stage / "wandb") for record in records(path)]
    runs = [record.run for record in written if record.HasField("run")]
    facts = {(run.run_id, run.display_name, run.run_group, run.job_type, run.project) for run in runs}
    assert facts == {(run_id(stage / "wandb"), "tiny-sft", "tiny", "sft", "tests")}
    assert [record.exit.exit_code for record in written if record.HasField("exit")] == [1, 0]
    told = capfd.readouterr().err
    assert told.count("W&B: offline, because there is no key for http://127.0.0.1:9 (set WANDB_API_KEY") == 2
    sync_both_attempts(stage)


def sync_both_attempts(stage: Path) -> None:
    """The command that the sentence names sends both attempts, each step once."""
    with wandb_server() as server:
        wandb = Path(sys.executable).with_name("wandb")
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": FAKE_KEY}
        for _ in range(2):
            command = [wandb, "sync", stage / "wandb"]
            subprocess.run(command, env=environment, cwd=stage, check=True, capture_output=True, timeout=120)
        assert_history(server.runs[run_id(stage / "wandb")].history())


def test_an_offline_attempt_that_was_killed_is_written_anew(tmp_path: Path) -> None:
    stage = tmp_path / "sft"
    run = begin(stage)
    append(stage, 1, 20, attempt=1)
    wait_for(lambda: read_state(stage / "wandb").last_step == 19)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    sentence = finish(run, {}, outcome="failed", timeout_seconds=15)
    assert sentence.startswith("W&B did not receive everything. ") and "-m orchestrator.metrics.wandb " in sentence
    torn = offline_files(stage / "wandb")
    assert len(torn) == 1
    attempt(stage, 16, 30, number=2)
    assert not torn[0].exists()
    assert_history(offline_history(stage / "wandb"))


def test_completions_become_a_table_of_their_step(tmp_path: Path) -> None:
    """A step that is done again by the next attempt has the completions of that attempt."""
    stage = tmp_path / "run" / "grpo"
    run = begin(stage)
    write_samples(stage, 2, attempt=1, completion="old")
    write_samples(stage, 2, attempt=2, completion="red")
    append(stage, 1, 4, attempt=2)
    finish(run, {}, outcome="finished", timeout_seconds=60)
    found = tables(offline_history(stage / "wandb"))
    assert list(found) == [2] and found[2]["_type"] == "table-file" and found[2]["nrows"] == 2
    (file,) = (stage / "wandb").glob("offline-run-*/files/media/table/*.table.json")
    content = json.loads(file.read_text())
    assert content["columns"] == ["prompt", "completion", "reward", "reward_exact"]
    assert content["data"] == [["Say red", "red", 0.25, 0.25], ["Say red", "red", 0.75, 0.75]]


# ---- online --------------------------------------------------------------------------------------------


def test_online_each_step_once_over_restarts(tmp_path: Path, server: WandbServer) -> None:
    stage = tmp_path / "sft"
    attempt(stage, 1, 15, number=1, outcome="stopped")
    run = server.only_run()
    assert run.steps() == ALL[:15] and run.exit_codes == [1] and run.num_preemptions > 0
    sentence = attempt(stage, 11, 30, number=2)
    assert sentence == f"W&B run: {server.url}/tester/tests/runs/{run.name}"
    assert server.only_run().name == run_id(stage / "wandb")
    assert_history(run.history())
    assert run.exit_codes == [1, 0] and run.num_overwritten_lines == 0
    assert run.summary["best_eval_loss"] == 0.5
    bucket = run.buckets[0]
    assert (bucket["groupName"], bucket["jobType"], bucket["displayName"]) == ("tiny", "sft", "tiny-sft")
    assert json.loads(bucket["config"])["model"]["value"] == {"base": "tiny"}
    files = [path for path in stage.rglob("*") if path.is_file()]
    assert files and not [path for path in files if FAKE_KEY.encode() in path.read_bytes()]


def test_offline_then_online_sends_all(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "sft"
    with monkeypatch.context() as no_key:
        no_key.delenv("WANDB_API_KEY")
        attempt(stage, 1, 15, number=1, outcome="stopped")
    attempt(stage, 11, 30, number=2)
    assert_history(server.only_run().history())
    assert [path.with_name(path.name + ".synced").exists() for path in offline_files(stage / "wandb")] == [True]


def test_a_worker_that_is_killed_ends_the_run_as_failed(tmp_path: Path, server: WandbServer) -> None:
    stage = tmp_path / "sft"
    code = (
        "import sys, time; from pathlib import Path; import test_wandb as t\n"
        "t.begin(Path(sys.argv[1])); t.append(Path(sys.argv[1]), 1, 20, attempt=1); time.sleep(60)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            map(str, (ROOT, Path(__file__).parent, ROOT / "tests", ROOT / "tests" / "helpers"))
        ),
    }
    with subprocess.Popen([sys.executable, "-c", code, str(stage)], env=environment) as worker:
        wait_for(lambda: (stage / "wandb" / "state.json").exists() and read_state(stage / "wandb").last_step == 19)
        worker.kill()
    wait_for(lambda: bool(server.only_run().exit_codes))
    assert server.only_run().exit_codes == [1]
    assert server.only_run().steps() == ALL[:19], (
        "the last step may lack its evaluation, and waits for the next attempt"
    )
    wait_for(lambda: not read_state(stage / "wandb").server_uncertain)
    attempt(stage, 20, 30, number=2)
    assert_history(server.only_run().history())


def test_a_sender_that_is_killed_is_replaced(tmp_path: Path, server: WandbServer) -> None:
    stage = tmp_path / "sft"
    run = begin(stage)
    append(stage, 1, 15, attempt=1)
    wait_for(lambda: read_state(stage / "wandb").last_step == 14)
    sender = read_state(stage / "wandb").sender_pid
    assert sender is not None
    os.kill(sender, signal.SIGKILL)
    append(stage, 16, 30, attempt=1)
    wait_for(lambda: read_state(stage / "wandb").sender_pid != sender)
    sentence = finish(run, {}, outcome="finished", timeout_seconds=60)
    assert sentence.startswith("W&B run: ")
    assert_history(server.only_run().history())


def test_signals_to_every_process_lose_nothing(tmp_path: Path, server: WandbServer) -> None:
    """Slurm signals every process of a step, also those in other sessions; the SDK's own service dies of it."""
    stage = tmp_path / "sft"
    run = begin(stage)
    append(stage, 1, 15, attempt=1)
    wait_for(lambda: read_state(stage / "wandb").last_step == 14)
    family = descendants(run.process.pid)
    assert len(family) >= 3, "supervisor, sender, and the service of the SDK"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in family:
            send_signal(pid, number)
    append(stage, 16, 30, attempt=1)
    sentence = finish(run, {}, outcome="stopped", timeout_seconds=60)
    assert sentence.startswith("W&B run: ")
    assert_history(server.only_run().history())


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in descendants(int(child)))]


def send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def test_a_server_that_takes_no_tables_loses_no_step(
    tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """This server knows no artifacts, which tables ask for."""
    stage = tmp_path / "run" / "grpo"
    run = begin(stage)
    write_samples(stage, 7, attempt=1, completion="red")
    append(stage, 1, 30, attempt=1)
    finish(run, {}, outcome="finished", timeout_seconds=60)
    assert_history(server.only_run().history())
    assert "the table of step 7 was not accepted" in capfd.readouterr().err


# ---- a server that is dead, or takes everything and answers nothing --------------------------------------


@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_server_that_is_not_there_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    stage = tmp_path / "sft"
    with unreachable(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        bare = seconds_to_append(tmp_path / "bare")
        began = time.monotonic()
        run = begin(stage)
        assert time.monotonic() - began < 2, "the worker does not wait for the server"
        assert seconds_to_append(stage) < 10 * bare + 1
        began = time.monotonic()
        sentence = finish(run, {}, outcome="finished", timeout_seconds=40)
        assert time.monotonic() - began < 40 + 2
    assert f"wandb sync {stage / 'wandb'}" in sentence
    assert_history(offline_history(stage / "wandb"))


def seconds_to_append(stage: Path) -> float:
    stage.mkdir(exist_ok=True)
    began = time.monotonic()
    append(stage, 1, 30, attempt=1)
    return time.monotonic() - began


def test_a_server_that_falls_silent(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end comes in time, nothing is left running, and the command in the sentence sends the rest."""
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    stage = tmp_path / "sft"
    run = begin(stage)
    append(stage, 1, 15, attempt=1)
    wait_for(lambda: bool(server.runs) and server.only_run().steps()[-1:] == [14])
    server.silent.set()
    append(stage, 16, 30, attempt=1)
    family = descendants(run.process.pid)
    began = time.monotonic()
    sentence = finish(run, {"best_eval_loss": 0.5}, outcome="finished", timeout_seconds=5)
    assert time.monotonic() - began < 5 + 2
    assert "did not receive everything within 5 s" in sentence
    wait_for(lambda: not [pid for pid in family if Path(f"/proc/{pid}").exists()])
    command = sentence.rpartition(": ")[2].split()
    server.silent.clear()
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert_history(server.only_run().history())
    assert server.only_run().exit_codes[-1] == 0 and server.only_run().summary["best_eval_loss"] == 0.5
    assert how_to_see(stage / "wandb") == f"W&B run: {server.url}/tester/tests/runs/{run_id(stage / 'wandb')}"

"""Requests to stop: signals, a STOP file, the end of the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forking
import pytest
from rank_runs import environment, make_place

from orchestrator.errors import EXIT_SAVED
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.stop_request import SIGNALS, StopRequest, job_deadline


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_a_second_one_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopRequest(tmp_path / "STOP")
    assert stop.reason() is None
    os.kill(os.getpid(), number)
    assert stop.reason() == number.name
    for other in SIGNALS:
        os.kill(os.getpid(), other)
    assert stop.reason() == number.name


def test_a_file_and_the_end_of_the_job_ask_too(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "STOP")
    (tmp_path / "STOP").touch()
    assert stop.reason() == "STOP file"
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    assert StopRequest(tmp_path / "other", deadline=job_deadline(end, lead_seconds=50)).reason() is None
    assert (
        StopRequest(tmp_path / "other", deadline=job_deadline(end, lead_seconds=300)).reason()
        == "the job's time limit is near"
    )
    assert (
        job_deadline({}, lead_seconds=300) is None
        and job_deadline({"SLURM_JOB_END_TIME": "NONE"}, lead_seconds=1) is None
    )


def test_a_real_worker_stops_before_its_first_step(tmp_path: Path) -> None:
    """The signals come while it still imports."""
    place = make_place(tmp_path)
    run = place.make("early", "tuning=full", ranks=1)
    argv = [sys.executable, "-m", "orchestrator.worker", str(run / "run.json"), "--stage", "sft"]
    worker = subprocess.Popen(argv, env=environment(place) | forking.FRESH, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not place.stage("early").prepared.exists():
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(120) == EXIT_SAVED
    attempt = read_json(place.stage("early").attempt(1))
    assert (attempt["state"], attempt["step"]) == ("stopped", 0)
    assert attempt["why"] in ("SIGTERM", "SIGINT"), "the one that Python saw first"

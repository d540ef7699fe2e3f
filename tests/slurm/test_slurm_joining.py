"""Joining a job of a real Slurm: told without a terminal, followed on one, left running, saved and ended. The worker is a stand-in."""

from __future__ import annotations

import _thread
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from launching import begun, make_slurm_spec, wait_until
from slurm_cluster import Cluster

from launchers import local
from orchestrator.composition.compose import compose
from orchestrator.errors import EXIT_DONE, EXIT_SAVED
from orchestrator.execution.following import StageJob
from orchestrator.execution.slurm_following import join_jobs
from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import RunFolder


def test_a_running_job_is_joined_left_running_and_ended(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(["+experiment=llama_lora", "name=run", f"output_dir={tmp_path}", "tracking=none"])
    run = RunFolder(tmp_path / "run")
    spec = make_slurm_spec(run.root, settings={"steps": 100_000, "step_seconds": 0.1}, nodes=1)
    settings = run.run.rename(
        run.root / "settings.json"
    )  # the stand-in's settings and the run's configuration share a name
    spec = replace(spec, command=(*spec.command[:2], str(settings)))
    write_json(run.run, {"config": config.model_dump(mode="json")})
    job = cluster.submit(spec)
    write_json(run.stage("sft").submission, {"token": "t", "job": job})
    stage = StageJob(name="sft", spec=spec, script=local.render(spec), steps=100_000)

    def join(answer: str = "", *, after: float = 0.0) -> int:
        def asked(_question: str) -> str:
            return answer

        if answer:
            monkeypatch.setattr("sys.stdin.isatty", lambda: True)
            monkeypatch.setattr("sys.stdout.isatty", lambda: True)
            monkeypatch.setattr("builtins.input", asked)
            threading.Timer(after, _thread.interrupt_main).start()
        return join_jobs(config, run, [stage], began=time.time())

    wait_until(begun(spec), seconds=30, what="the first step")
    assert join() == EXIT_DONE and f"sft: job {job} (RUNNING) runs, at step" in capsys.readouterr().out
    assert join("l", after=2.0) == EXIT_SAVED and cluster.state(job) == "RUNNING"
    assert join("s", after=2.0) == EXIT_SAVED and cluster.wait(job) != "RUNNING"
    assert read_json(run.stage("sft").attempt(1))["state"] == "stopped"

"""A small job for launcher tests: a stub worker and a stub verdict, standard library only."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launchers.process import Launch, Outcome
from launchers.spec import ClusterSettings, JobSpec

STAND_INS = Path(__file__).parents[1] / "slurm" / "stand_ins"


def make_spec(run: Path, *, settings: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    """A job in the folder `run`; `settings` are those of the stub worker. Writes the settings, nothing else."""
    stage = run / "sft"
    stage.mkdir(parents=True, exist_ok=True)
    facts = {"stage_directory": str(stage), "stop_file": str(stage / "STOP"), "steps": 5, "step_seconds": 0.1}
    (run / "run.json").write_text(json.dumps(facts | (settings or {})), encoding="utf-8")
    return make_pure_spec(str(run), **changes)


def make_pure_spec(run: str, **changes: Any) -> JobSpec:
    stage = f"{run}/sft"
    values: dict[str, Any] = {
        "name": "demo-sft",
        "stage": "sft",
        "command": (sys.executable, str(STAND_INS / "worker.py"), f"{run}/run.json"),
        "decide": (sys.executable, str(STAND_INS / "decide.py"), stage),
        "working_directory": run,
        "script_path": f"{run}/scripts/sft.sh",
        "stage_directory": stage,
        "attempts_directory": f"{stage}/attempts",
        "result_file": f"{stage}/result.json",
        "stop_file": f"{stage}/STOP",
        "log_directory": f"{stage}/logs",
        "nodes": 1,
        "processes_per_node": 2,
        "python": sys.executable,
    }
    return JobSpec(**(values | changes))


def make_slurm_spec(run: Path, *, cluster: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    site = {"cpus_per_task": 2, "memory": "500M", "time_limit": "10:00", "stop_lead_seconds": 60, "interface": "lo"}
    size = {"nodes": 2, "processes_per_node": 1, "script_path": f"{run}/scripts/sft.sbatch"}
    return make_spec(run, cluster=ClusterSettings(**(site | (cluster or {}))), **(size | changes))


def wait_until(
    condition: Callable[[], bool], *, seconds: float, what: str, evidence: Callable[[], str] = lambda: ""
) -> None:
    """Wait for the condition; a timeout fails with `what` was awaited and the evidence that is there by then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{evidence()}"
        time.sleep(0.1)


def wait_for_outcome(running: Launch, *, seconds: float = 60) -> Outcome:
    wait_until(lambda: not running.is_running(), seconds=seconds, what="the end of the script")
    outcome = running.poll()
    assert outcome is not None
    return outcome


def read_seen(spec: JobSpec, *, rank: int = 0, attempt: int = 1) -> dict[str, Any]:
    path = Path(spec.stage_directory) / "seen" / f"rank-{rank}.attempt-{attempt}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def begun(spec: JobSpec, *, attempt: int = 1) -> Callable[[], bool]:
    """True once every rank of the attempt has completed its first step."""
    ranks = range(spec.nodes * spec.processes_per_node)
    paths = [Path(spec.stage_directory) / f"steps.rank-{rank}" for rank in ranks]
    return lambda: all(path.exists() and f"\n{attempt} " in "\n" + path.read_text() for path in paths)

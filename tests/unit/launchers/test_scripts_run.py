"""The scripts executed on this machine, with stand-ins for the worker, the verdict, torchrun and Slurm's commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import STAND_INS, begun, make_spec, read_seen, wait_for_outcome, wait_until

from launchers import local, sbatch, torchrun
from launchers.process import follow, launch
from launchers.spec import ClusterSettings, JobSpec, Script, write

HOSTILE = 'it\'s "x" $(touch pwned) `id` ; & | > ü %j #!* ~'
HOSTILE_WORDS = ("", "-x", "a\nb", "$$ ${local_rank} $HOME", "back\\slash", "tab\there", "é\u2028", HOSTILE, "@{name}")
SITE = ClusterSettings(cpus_per_task=2, memory="1G", time_limit="1:00:00")


def hostile_spec(folder: Path, **changes: Any) -> JobSpec:
    run = folder / HOSTILE
    python = run / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(STAND_INS / "python", python)
    python.write_text(python.read_text().replace("/usr/bin/env python3", sys.executable))
    plain = make_spec(run, settings={"steps": 1, "show": ["HOSTILE", "EMPTY", "STAND_IN_OPTIONS"]})
    environment = {"HOSTILE": "\n".join(HOSTILE_WORDS), "EMPTY": "", "REAL_PYTHON": sys.executable}
    values: dict[str, Any] = {
        "name": HOSTILE,
        "python": str(python),
        "command": (str(python), *plain.command[1:], *HOSTILE_WORDS),
        "environment": environment,
        "processes_per_node": 1,
        "cluster": SITE,
    }
    return make_spec(run, settings={"steps": 1, "show": list(environment)}, **(values | changes))


def assert_arrived(spec: JobSpec) -> None:
    seen = read_seen(spec)
    assert seen["argv"][2 : 2 + len(HOSTILE_WORDS)] == list(HOSTILE_WORDS)
    assert seen["argv"][-2:] == ["--attempt", "1"]
    assert seen["environment"]["HOSTILE"] == "\n".join(HOSTILE_WORDS)
    assert seen["environment"]["EMPTY"] == ""
    assert seen["folder"] == spec.working_directory
    assert not list(Path(spec.working_directory).parent.rglob("pwned"))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("launcher", [local, torchrun])
def test_hostile_values_arrive_unchanged(tmp_path: Path, launcher: Any, direct: bool) -> None:
    spec = hostile_spec(tmp_path, single_process_direct=direct)
    outcome = wait_for_outcome(launch(launcher.render(spec), spec))
    assert outcome.exit_code == 0, outcome
    assert_arrived(spec)


def test_hostile_values_arrive_unchanged_through_slurm(tmp_path: Path) -> None:
    spec = hostile_spec(tmp_path)
    done = run_as_job(write(sbatch.render(spec)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_arrived(spec)


def run_as_job(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a batch script on stand-ins of scontrol, squeue and srun (one node: this machine)."""
    commands = folder / "commands"
    commands.mkdir()
    stand_ins = {
        "scontrol": "if [[ $1 == show && $2 == hostnames ]]; then hostname; fi",
        "squeue": "true",
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
    }
    for name, text in stand_ins.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    facts = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here"}
    return subprocess.run(["bash", script], env={**os.environ, **facts}, capture_output=True, text=True, timeout=60)


def test_local_starts_every_rank_with_its_facts(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, processes_per_node=3)
    outcome = wait_for_outcome(launch(local.render(spec), spec))
    assert (outcome.exit_code, outcome.attempt, outcome.cause) == (0, 1, None)
    facts = [read_seen(spec, rank=rank)["environment"] for rank in range(3)]
    assert [fact["RANK"] for fact in facts] == ["0", "1", "2"] == [fact["LOCAL_RANK"] for fact in facts]
    assert {(fact["WORLD_SIZE"], fact["LOCAL_WORLD_SIZE"], fact["MASTER_ADDR"]) for fact in facts} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({fact["MASTER_PORT"] for fact in facts}) == 1
    log = Path(spec.log_directory, "node-0.attempt-1.log").read_text()
    assert all(f"rank {rank} begins" in log for rank in range(3))


def test_a_single_process_gets_no_distributed_variables(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, processes_per_node=1, single_process_direct=True)
    assert wait_for_outcome(launch(torchrun.render(spec), spec)).exit_code == 0
    assert set(read_seen(spec)["environment"].values()) == {None}


@pytest.mark.parametrize(
    ("fault", "exit_code", "sentence"),
    [
        ({"signal": 9}, 1, "rank 1 on .* was killed by SIGKILL"),
        ({"exit": 5, "message": "ValueError: bad row"}, 1, "rank 1 on .* exit code 5: ValueError: bad row"),
        ({"exit": 93}, 93, "exit code 93"),
        ({"exit": 2, "message": "ConfigError: x"}, 2, "exit code 2: ConfigError: x"),
    ],
)
def test_one_dead_rank_ends_the_others_and_is_named(
    tmp_path: Path, fault: dict[str, Any], exit_code: int, sentence: str
) -> None:
    settings = {"steps": 1000, "obeys_term": True, "faults": {"1:1": {"step": 3, **fault}}}
    spec = make_spec(tmp_path, settings=settings, processes_per_node=3)
    outcome = wait_for_outcome(launch(local.render(spec), spec), seconds=15)
    assert outcome.exit_code == exit_code
    assert outcome.cause is not None and outcome.cause.rank == 1
    assert re.search(sentence, str(outcome.cause))
    record = json.loads(Path(spec.attempts_directory, "1.json").read_text())
    assert record["cause"] == str(outcome.cause) and record["exit_code"] == fault.get("exit", 137)
    assert not any(is_alive(read_seen(spec, rank=rank)["pid"]) for rank in range(3))


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_stop_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings={"steps": 30})
    running = launch(local.render(spec), spec)
    wait_until(begun(spec), seconds=20, what="the first step")
    running.stop()
    outcome = wait_for_outcome(running)
    assert (outcome.exit_code, outcome.attempt) == (75, 1)
    outcome = wait_for_outcome(launch(local.render(spec), spec))
    assert (outcome.exit_code, outcome.attempt) == (0, 2)
    steps = [line.split()[1] for line in Path(spec.stage_directory, "steps.rank-0").read_text().splitlines()]
    assert steps == [str(step) for step in range(1, 31)]
    assert wait_for_outcome(launch(local.render(spec), spec)).last_words.startswith("demo-sft: nothing to do")


@pytest.mark.parametrize(("interrupts", "exit_code"), [(1, 75), (2, 137)])
def test_ctrl_c_saves_and_a_second_one_kills(tmp_path: Path, interrupts: int, exit_code: int) -> None:
    spec = make_spec(tmp_path, settings={"steps": 1000, "step_seconds": 0.1 if interrupts == 1 else 600})
    running = launch(local.render(spec), spec)
    started = [Path(spec.stage_directory, "seen", f"rank-{rank}.attempt-1.json") for rank in (0, 1)]
    wait_until(lambda: all(file.exists() for file in started), seconds=20, what="both ranks")
    left = [KeyboardInterrupt] * interrupts

    def tick() -> None:
        if left:
            raise left.pop()

    assert follow(running, tick=tick, every_seconds=0.1).exit_code == exit_code
    wait_until(lambda: not is_alive(read_seen(spec)["pid"]), seconds=5, what="the end of rank 0")


def test_an_attempt_that_was_killed_is_closed_by_the_next_start(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings={"steps": 1000})
    with launch(local.render(spec), spec) as running:
        wait_until(begun(spec), seconds=20, what="the first step")
        second = wait_for_outcome(launch(local.render(spec), spec))
        assert second.exit_code == 3 and "attempt 1 is still running" in second.last_words
        running.kill()
    make_spec(tmp_path, settings={"steps": 3})
    outcome = wait_for_outcome(launch(local.render(spec), spec))
    assert (outcome.exit_code, outcome.attempt) == (0, 2)
    assert Path(spec.stage_directory, "decisions").read_text() == "1 255\n2 0\n"


@pytest.mark.parametrize(("steps", "exit_code"), [(3, 0), (1000, 1)])
def test_without_a_verdict_only_the_result_counts(tmp_path: Path, steps: int, exit_code: int) -> None:
    faults = {"1:0": {"step": 5, "exit": 5}}
    settings = {"steps": steps, "faults": faults, "obeys_term": True}
    decide = (sys.executable, "-c", "raise SystemExit('broken')")
    spec = make_spec(tmp_path, settings=settings, decide=decide)
    assert wait_for_outcome(launch(local.render(spec), spec)).exit_code == exit_code
    assert "could not be judged" in Path(spec.log_directory, "launch.log").read_text()


def test_what_prevents_a_start_is_said_with_exit_code_3(tmp_path: Path) -> None:
    cases = {
        "there is no Python at /nowhere/python": make_spec(tmp_path / "a", python="/nowhere/python"),
        "the run folder /nowhere is not there": make_spec(tmp_path / "b", working_directory="/nowhere"),
        "the scratch folder /nowhere is not there": make_spec(
            tmp_path / "c", cluster=ClusterSettings(scratch="/nowhere")
        ),
    }
    for sentence, spec in cases.items():
        outcome = wait_for_outcome(launch(local.render(spec), spec))
        assert outcome.exit_code == 3 and sentence in outcome.last_words


def test_a_container_command_wraps_the_ranks_only(tmp_path: Path) -> None:
    wrapper = tmp_path / "container run"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/wrapped"\nshift\nexport INSIDE=yes\nexec "$@"\n')
    wrapper.chmod(0o755)
    cluster = ClusterSettings(container_command=(str(wrapper), "image one"))
    spec = make_spec(tmp_path / "run", settings={"show": ["INSIDE"]}, cluster=cluster)
    assert wait_for_outcome(launch(local.render(spec), spec)).exit_code == 0
    assert read_seen(spec)["environment"]["INSIDE"] == "yes"
    lines = (tmp_path / "wrapped").read_text().splitlines()
    assert len(lines) == 2 and all("launchers.guard" in line and "decide" not in line for line in lines)


def test_node_ranks_are_checked(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, nodes=2)
    path = write(torchrun.render(spec))
    for rank in ("2", "-1", "x", ""):
        done = subprocess.run(
            ["bash", path, rank], env={**os.environ, "NODE_RANK": "9"}, capture_output=True, text=True
        )
        assert done.returncode == 3 and "0 to 1 is allowed" in done.stderr


def test_a_script_is_written_once_and_atomically(tmp_path: Path) -> None:
    script = Script(path=str(tmp_path / "a" / "x.sh"), text="echo ü\n", mode=0o700)
    path = write(script)
    before = path.stat()
    time.sleep(0.01)
    write(script)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["x.sh"]


def test_launchers_import_neither_torch_nor_the_orchestrator() -> None:
    code = (
        "import sys; from launchers import causes, guard, local, process, sbatch, torchrun; "
        "print([m for m in sys.modules if m.split('.')[0] in {'torch', 'orchestrator', 'pydantic'}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

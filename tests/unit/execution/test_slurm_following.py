"""A command on a run that Slurm has already joins it. squeue is a stand-in program that says what a file says."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SLURM_SIZE, Asker
from run_folders import finish, write_run, write_training

from launchers import local
from orchestrator.errors import EXIT_DONE, EXIT_LAUNCH_FAILED, EXIT_SAVED
from orchestrator.execution import slurm_following
from orchestrator.execution.following import StageJob
from orchestrator.execution.job_specs import job_spec
from orchestrator.execution.slurm_following import join_jobs
from orchestrator.files.atomic import write_json, write_text
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.attempts import Attempt, write_attempt
from orchestrator.run_state.frozen import load_config

PENDING = "7|7|PENDING|Priority|0:00|1:00|N/A|"
RUNNING = "7|7|RUNNING|None|0:10|1:00|N/A|node1"
FAILED = "7|7|FAILED|NonZeroExitCode|0:10|1:00|N/A|node1"
SILENT = "silent"


class Queue:
    """A run with job 7, and what Slurm says of it."""

    def __init__(self, folder: Path) -> None:
        self.run: RunFolder = write_run(folder, "run")
        self.files = self.run.stage("sft")
        write_training(self.files, [2.0, 1.5, 1.0], evaluations={})
        write_json(self.files.submission, {"token": "t", "job": "7"})
        self._answer = folder / "answer"
        for name in ("squeue", "sacct", "scontrol"):
            program = folder / "bin" / name
            write_text(program, f'#!/bin/sh\n[ {name} = squeue ] || exit 1\nread line < "{self._answer}"\n'
                       '[ "$line" != silent ] || { echo "Unable to contact slurm controller" >&2; exit 1; }\necho "$line"\n')  # fmt: skip
            program.chmod(0o755)

    def says(self, line: str) -> None:
        write_text(self._answer, f"{line}\n")

    def join(self) -> int:
        config = load_config(self.run)
        job = StageJob(name="sft", spec=job_spec(config, "sft"), script=local.render(job_spec(config, "sft")), steps=9)
        return join_jobs(config, self.run, [job], began=time.time())


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_following, "ASK_SECONDS", 0.1)
    return queue


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a person at a terminal, who gives an answer where something is asked."""

    def answers(answer: str) -> None:
        def asked(_question: str) -> str:
            return answer

        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setattr("builtins.input", asked)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")

    return answers


def later(seconds: float, act: Callable[[], object]) -> None:
    threading.Timer(seconds, act).start()


@pytest.mark.parametrize(
    ("answer", "told", "code"),
    [
        (PENDING, "sft: job 7 (PENDING, Priority) is waiting for its turn: other jobs come first\n", EXIT_DONE),
        (RUNNING, "sft: job 7 (RUNNING) runs, at step 3 of 3\n", EXIT_DONE),
        (
            SILENT,
            "sft: the state of job 7 is unknown: Slurm gives no answer about it, which is not a failure\n",
            EXIT_SAVED,
        ),
    ],
)
def test_without_a_terminal_it_tells_where_the_job_is(
    queue: Queue, capsys: pytest.CaptureFixture[str], answer: str, told: str, code: int
) -> None:
    queue.says(answer)
    assert queue.join() == code
    out = capsys.readouterr().out
    assert out.startswith(told) and out.endswith(f"follow it with: orchestrator status {queue.run.root} --watch\n")


def test_run_and_resume_join_what_was_submitted(ask: Asker, queue: Queue) -> None:
    queue.says(PENDING)
    words = ("+experiment=llama_lora", "name=again", "tracking=none", "launcher=slurm", "cluster=h100x8", *SLURM_SIZE)
    assert ask("render", *words, "cluster.processes_per_node=1").code == 0
    write_json(RunFolder(ask.folder / "runs" / "again").stage("sft").submission, {"token": "t", "job": "7"})
    for again in (("resume", "runs/again"), ("run", *words, "cluster.processes_per_node=1")):
        answer = ask(*again)
        assert answer.code == EXIT_DONE and "sft: already submitted, as job 7\n" in answer.out, answer
        assert (
            "sft: job 7 (PENDING, Priority) is waiting for its turn" in answer.out and "\nfollow it" not in answer.out
        )


def test_a_terminal_shows_the_queue_then_the_progress_then_the_result(
    queue: Queue, capsys: pytest.CaptureFixture[str], terminal: Callable[[str], None]
) -> None:
    terminal("")
    queue.says(PENDING)
    later(1.0, lambda: queue.says(SILENT))
    later(2.0, lambda: queue.says(RUNNING))
    later(3.5, lambda: finish(queue.files, best_step=None, phase_seconds={}))
    assert queue.join() == EXIT_DONE
    out = capsys.readouterr().out
    shown = (
        "is waiting for its turn: other jobs come first",
        "the state of job 7 is unknown",
        "3/3 steps",
        "is done and proven",
    )
    places = [out.find(text) for text in shown]
    assert -1 not in places and places == sorted(places), out


def test_ctrl_c_leaves_it_running_or_has_it_cancelled(
    queue: Queue, capsys: pytest.CaptureFixture[str], terminal: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.says(RUNNING)
    terminal("l")
    later(1.0, _thread.interrupt_main)
    assert queue.join() == EXIT_SAVED and not queue.files.stop.exists()
    assert "sft: left running" in capsys.readouterr().out
    write_text(queue.run.root.parent / "bin" / "scancel", '#!/bin/sh\necho "$@" >> "$0.asked"\n')
    (queue.run.root.parent / "bin" / "scancel").chmod(0o755)
    terminal("s")
    later(1.0, _thread.interrupt_main)
    later(2.0, lambda: queue.says(FAILED))
    assert queue.join() == EXIT_SAVED and queue.files.stop.read_text() == "cancel\n"
    assert (queue.run.root.parent / "bin" / "scancel.asked").read_text() == "--batch --signal=USR2 7\n"


def test_how_a_job_ended_is_told_from_the_record_of_its_attempt(
    queue: Queue, capsys: pytest.CaptureFixture[str], terminal: Callable[[str], None]
) -> None:
    terminal("")
    queue.says(FAILED)
    assert queue.join() == EXIT_LAUNCH_FAILED
    assert "error: sft: job 7 (FAILED, NonZeroExitCode) ended with a nonzero exit code" in capsys.readouterr().err
    stopped = Attempt(number=1, state="stopped", why="a signal", host="h", rank=None, exit_code=75, step=3)
    write_attempt(queue.files, stopped)
    assert queue.join() == EXIT_SAVED
    assert "saved at step 3 (a signal); the same command continues from there" in capsys.readouterr().out

"""Two commands on one run: one starts it, the other joins; Ctrl-C; what must not be taken for alive. Stand-in ranks, no torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from launching import begun, make_spec, wait_for_outcome, wait_until

from launchers import local
from launchers.claims import Claim, identify, open_claim
from launchers.process import Joined, launch
from launchers.spec import JobSpec, Script
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.errors import EXIT_DONE, EXIT_SAVED, LaunchFailed, RunFolderError
from orchestrator.execution import following
from orchestrator.execution.cancel import cancel
from orchestrator.execution.following import StageJob, run_stage
from orchestrator.files.atomic import write_json, write_text
from orchestrator.housekeeping.prune import of_runs
from orchestrator.housekeeping.remove import refusals
from orchestrator.metrics.jsonl import RecordFile
from orchestrator.monitoring.stage_status import stage_statuses
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.attempts import INTERRUPTED, read_attempts
from orchestrator.run_state.location import settle
from orchestrator.run_state.moved import refuse_left_behind


def claim_of(spec: JobSpec) -> Claim:
    claim = open_claim(spec.log_directory, spec.attempts_directory)
    assert claim is not None
    return claim


# ---- whether an attempt is alive -----------------------------------------------------------------


def test_a_claim_tells_a_process_from_a_later_one_with_its_number(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings={"steps": 1000}, processes_per_node=1)
    with launch(local.render(spec), spec) as running:
        wait_until(lambda: running.attempt is not None, seconds=20, what="the claim")
        claim = claim_of(spec)
        assert claim.is_of_this_machine and claim.is_alive and claim.script == Path(spec.script_path)
        assert claim.process == running.process_id and claim.identity == identify(claim.process)
        boot, started, namespace = claim.identity.split(" ")
        for other in (f"{boot} {int(started) + 1} {namespace}", f"another-boot {started} {namespace}"):
            assert not replace(claim, identity=other).is_alive, "the number was given to another process"
        elsewhere = (replace(claim, identity=f"{boot} {started} pid:[1]"), replace(claim, host="other"))
        assert not any(one.is_of_this_machine for one in (*elsewhere, replace(claim, job="12")))
        running.kill()
    assert not claim.is_alive, "a zombie is not alive either"
    write_json(Path(spec.attempts_directory) / "1.json", {})
    assert open_claim(spec.log_directory, spec.attempts_directory) is None


def test_of_two_scripts_at_one_moment_one_begins(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings={"steps": 1000}, processes_per_node=1)
    script = local.render(spec)
    both = [launch(script, spec), launch(script, spec)]
    try:
        wait_until(lambda: sum(one.is_running() for one in both) == 1, seconds=30, what="the end of one of them")
        (refused,) = [one.poll() for one in both if not one.is_running()]
        assert refused is not None and refused.exit_code == 3 and "is still running" in refused.last_words
        assert [path.name for path in Path(spec.log_directory).glob("attempt-*")] == ["attempt-1"]
        assert not list(Path(spec.log_directory).glob(".claim*"))
    finally:
        for one in both:
            one.kill()


def test_a_script_in_a_copied_folder_does_not_run_the_original(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", processes_per_node=1)
    local_script = local.render(spec)
    for folder in (tmp_path / "run", tmp_path / "copy"):
        write_text(folder / "scripts" / "sft.sh", local_script.text)
    ended = subprocess.run(["bash", tmp_path / "copy" / "scripts" / "sft.sh"], capture_output=True, text=True)
    assert ended.returncode == 3 and f"this script was written for {spec.script_path}" in ended.stderr
    assert not Path(spec.log_directory).exists()


def test_a_second_interrupt_of_a_script_by_hand_is_no_failure_of_the_ranks(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, settings={"steps": 1000, "step_seconds": 600}, processes_per_node=1)
    running = launch(local.render(spec), spec)
    wait_until(lambda: Path(spec.stage_directory, "seen").exists(), seconds=20, what="the rank")
    for _ in range(2):
        os.kill(running.process_id, 2)
        time.sleep(0.5)
    wait_for_outcome(running)
    assert Path(spec.stage_directory, "decisions").read_text() == f"1 {INTERRUPTED}\n"


# ---- the command ---------------------------------------------------------------------------------


class Bench:
    """A run whose ranks are stand-ins: real scripts, claims, locks and records."""

    def __init__(self, folder: Path) -> None:
        self.config: RunConfig = compose(
            ["+experiment=llama_lora", "name=run", f"output_dir={folder}", "launcher=local"]
        )
        self.run = RunFolder(folder / "run")
        self.spec: JobSpec = make_spec(self.run.root, settings={"steps": 1000}, processes_per_node=1)
        (self.run.root / "settings.json").write_bytes(self.run.run.read_bytes())
        command = (sys.executable, self.spec.command[1], str(self.run.root / "settings.json"))
        self.spec = replace(self.spec, command=command)
        write_json(self.run.run, {"config": self.config.model_dump(mode="json")})
        self.script: Script | None = None
        """Another script than that of `spec`."""

    @property
    def files(self) -> StageFolder:
        return self.run.stage("sft")

    def set_worker(self, **settings: float) -> None:
        file = self.run.root / "settings.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    def follow(self, watch: Callable[[str], bool] = lambda _: False) -> int:
        job = StageJob(name="sft", spec=self.spec, script=self.script or local.render(self.spec), steps=1000)
        return run_stage(self.config, self.run, job, watch=watch, began=time.time())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    claim = open_claim(bench.spec.log_directory, bench.spec.attempts_directory)
    if claim is not None:
        Joined(claim, bench.spec).kill()


def interrupted_after(times: int, ready: Callable[[], bool]) -> Callable[[str], bool]:
    """A watch that stands in for somebody at the keyboard: Ctrl-C, so many times, once the job has begun."""
    left = [KeyboardInterrupt] * times

    def watch(_stage: str) -> bool:
        if left and ready():
            raise left.pop()
        return False

    return watch


def test_two_commands_at_one_moment_start_one_and_join_it(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    """In the end both have followed the same attempt."""
    bench.set_worker(steps=60)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(bench.follow())) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(begun(replace(bench.spec, processes_per_node=1)), seconds=30, what="the first step")
    wait_until(lambda: "joined it" in capfd.readouterr().out, seconds=20, what="the other command")
    for thread in threads:
        thread.join(60)
    assert codes == [EXIT_DONE, EXIT_DONE]
    assert [path.name for path in bench.files.logs.glob("attempt-*")] == ["attempt-1"]


def test_ctrl_c_of_a_command_that_joined_leaves_the_job_alone(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody can be asked here: standard input is no terminal."""
    owner = launch(local.render(bench.spec), bench.spec)
    wait_until(begun(bench.spec), seconds=20, what="the first step")
    assert bench.follow(interrupted_after(1, lambda: True)) == EXIT_SAVED
    assert owner.is_running() and not bench.files.stop.exists()
    assert "left running" in capfd.readouterr().out
    owner.kill()


@pytest.mark.parametrize("before", ["say() {", "  claim_attempt\n"], ids=["before its traps", "after its traps"])
def test_ctrl_c_while_a_stage_is_being_started_is_not_lost(
    bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str], before: str
) -> None:
    """A real signal between the start of the script and its claim."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    script = local.render(bench.spec)
    waiting = f"touch {ready}; while [ ! -e {go} ]; do sleep 0.05; done\n"
    assert before in script.text
    bench.script = replace(script, text=script.text.replace(before, waiting + before, 1))

    def interrupt() -> None:
        wait_until(ready.exists, seconds=20, what="the script")
        time.sleep(0.3)  # the command has begun to wait for the claim
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        go.touch()

    keyboard = threading.Thread(target=interrupt)
    keyboard.start()
    assert bench.follow() == EXIT_SAVED
    keyboard.join()
    record = bench.files.attempts / "1.json"
    if record.exists():
        assert json.loads(record.read_text())["state"] == "stopped"
    else:
        assert "sft: ended by Ctrl-C before it began; the same command starts it" in capfd.readouterr().out


def test_a_second_ctrl_c_is_recorded_as_what_it_is(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    with RecordFile(bench.files.metrics) as metrics:
        metrics.append({"step": 53, "attempt": 1, "loss": 1.0})
    bench.files.checkpoint(50).mkdir(parents=True)
    bench.set_worker(step_seconds=600)
    seen = Path(bench.spec.stage_directory, "seen")
    assert bench.follow(interrupted_after(2, seen.exists)) == EXIT_SAVED
    (attempt,) = read_attempts(bench.files)
    assert (attempt.state, attempt.step, attempt.exit_code) == ("stopped", 53, INTERRUPTED)
    assert attempt.why == "ended by a second Ctrl-C at step 53; the last checkpoint is of step 50"
    told = capfd.readouterr()
    assert f"sft: {attempt.why}; the same command continues from there" in told.out
    assert "killed" not in told.out + told.err and "memory" not in told.err


def test_a_run_is_running_by_its_process_and_not_by_the_age_of_its_files(bench: Bench, tmp_path: Path) -> None:
    """Silent for ten minutes and alive; killed a moment ago and dead; a copy of what runs."""
    owner = launch(local.render(bench.spec), bench.spec)
    wait_until(begun(bench.spec), seconds=20, what="the first step")
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(bench.run.root, copy.root)
    for log in bench.files.logs.glob("*.log"):
        os.utime(log, (time.time() - 600, time.time() - 600))
    (alive,) = stage_statuses([bench.run])
    assert alive.state == "running" and "stage sft is running" in next(refusals(bench.run.root))
    assert of_runs([bench.run]) == ([f"{bench.run.root}: skipped, stage sft is running"], [])
    (copied,) = stage_statuses([copy])
    assert copied.state == "lost" and copied.why.startswith(f"copied from {bench.run.root} while attempt 1 ran there")
    owner.kill()
    write_text(bench.files.metrics, "")  # the last sign is from this very moment
    (dead,) = stage_statuses([bench.run])
    assert dead.state == "lost" and dead.why.startswith(f"process {owner.process_id} ended without a record of how")
    assert not any("is running" in sentence for sentence in refusals(bench.run.root)) and not of_runs([bench.run])[0]


def test_an_attempt_on_another_machine_is_named_and_not_started_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = bench.files.logs / "attempt-1"
    write_text(state / "claim", "far-away 77 \n")
    write_text(state / "process", "boot 1 pid:[1]\n")
    write_text(state / "node-0.alive", "far-away 1.0\n")
    monkeypatch.setattr(following, "LISTEN_SECONDS", 3.0)
    threading.Timer(0.5, lambda: write_text(state / "node-0.alive", "far-away 2.0\n")).start()
    with pytest.raises(LaunchFailed, match="attempt 1 is running on far-away, which shares this folder"):
        bench.follow()


def test_a_job_whose_folder_was_moved_saves_where_it_was_started(
    bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settle(bench.run, ("sft",))
    bench.set_worker(step_seconds=4)
    old, pipeline = bench.run.root, bench.config.model_copy(update={"pipeline": ("sft",)})
    owner = launch(local.render(bench.spec), bench.spec)
    wait_until(begun(bench.spec), seconds=30, what="the first step")
    copy = RunFolder(Path(shutil.copytree(old, tmp_path / "copy")))
    assert cancel(copy, pipeline) == EXIT_DONE and not copy.stage("sft").stop.exists()
    assert f"nothing to cancel: {copy.root} is a copy of {old}, and nothing runs here" in capfd.readouterr().out
    moved = bench.run = RunFolder(old.rename(tmp_path / "moved"))
    bench.spec = replace(
        bench.spec,
        script_path=str(moved.scripts / "sft.sh"),
        log_directory=str(bench.files.logs),
        attempts_directory=str(bench.files.attempts),
    )
    with pytest.raises(RunFolderError) as refused:
        bench.follow()
    assert f"process {owner.process_id} (attempt 1) is still running in {old}" in str(refused.value)
    assert f"type `cancel {moved.root}`" in str(refused.value) and "kill" not in str(refused.value)
    (alive,) = stage_statuses([moved])
    assert alive.state == "running" and f"runs in {old}, from where the run folder was moved" in alive.why
    assert cancel(moved, pipeline) == EXIT_DONE
    told = capfd.readouterr().out
    assert f"process {owner.process_id} is still running in {old}" in told and f"cp -a {old}/. {moved.root}" in told
    wait_until(lambda: not owner.is_running(), seconds=30, what="the end")
    assert (old / "sft" / "step.json").exists() and not bench.files.stop.exists()
    (ended,) = stage_statuses([moved])
    assert ended.state == "lost" and f"is in {old}: type `cp -a {old}/. {moved.root}` and resume" in ended.why


def test_later_work_in_the_old_place_is_named_before_a_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    settle(bench.run, ("sft",))
    old, moved = bench.run.root, RunFolder(bench.run.root.rename(tmp_path / "moved"))
    moved.stage("sft").checkpoint(50).mkdir(parents=True)
    refuse_left_behind(moved, ["sft"])
    for step in (50, 53):
        RunFolder(old).stage("sft").checkpoint(step).mkdir(parents=True)
        if step == 50:
            refuse_left_behind(moved, ["sft"])
    with pytest.raises(
        RunFolderError, match=rf"newest checkpoint \(step 53\) is in {old / 'sft'}.*cp -a {old}/\. {moved.root}"
    ):
        refuse_left_behind(moved, ["sft"])
    shutil.copytree(old, moved.root, dirs_exist_ok=True)
    refuse_left_behind(moved, ["sft"])


def test_a_job_outlives_its_command_and_is_joined_to_its_end(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, 'tests/helpers')\n"
        "from launching import make_pure_spec; from launchers import local; from launchers.process import launch\n"
        "from dataclasses import replace\n"
        "run = sys.argv[1]\n"
        "spec = replace(make_pure_spec(run, processes_per_node=1), command=(sys.executable, sys.argv[2], run + '/settings.json'))\n"
        "running = launch(local.render(spec), spec); time.sleep(600)\n"
    )
    bench.set_worker(steps=40)
    front = subprocess.Popen([sys.executable, "-c", program, bench.run.root, bench.spec.command[1]])
    wait_until(begun(bench.spec), seconds=30, what="the first step")
    front.kill()
    front.wait()
    assert bench.follow() == EXIT_DONE
    assert bench.files.result.exists() and "joined it" in capfd.readouterr().out

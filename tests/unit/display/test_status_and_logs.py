"""What `status`, `logs` and `compare` show of run folders: widths, reasons, columns, differences, warnings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Asker
from run_folders import DIGESTS, finish, stop, write_run, write_training

from orchestrator.files.atomic import read_json, write_json
from orchestrator.metrics.jsonl import RecordFile
from orchestrator.monitoring.stage_status import StageStatus, stage_statuses
from orchestrator.run_folder.folder import RunFolder

LONG = "the ranks ended with exit code 137: " + "killed from outside, or out of host memory; " * 6


def trained(root: Path, name: str, *words: str, loss: float = 1.0, held_out: str = "rows1") -> RunFolder:
    run = write_run(root, name, *words)
    write_training(run.stage("sft"), [2.0, 1.8, 1.5, loss], evaluations={0: 2.0, 2: 1.2, 4: loss})
    finish(run.stage("sft"), eval_loss_after=loss)
    write_json(run.stage("sft").prepared, {"evaluation": f"/cache/data/{held_out}", "content": DIGESTS})
    return run


def test_status_fits_eighty_columns_with_long_reasons_and_names(ask: Asker) -> None:
    run = write_run(ask.folder, "a_name_that_is_long-" * 3 + "x")
    write_training(run.stage("sft"), [2.0, 1.9], evaluations={0: 2.0})
    stop(run.stage("sft"), state="failed", why=LONG)
    trained(ask.folder, "done", "stages.sft.optimizer.lr=2e-3")
    told = ask("status", str(ask.folder), "--show", "lr,optimizer.lr,memory,tuning.rank,key=seed")
    assert told.code == 0 and max(map(len, told.out.splitlines())) <= 80, told
    assert " ".join(told.out.split()).count(" ".join(LONG.split())) == 1 and "0.00025" in told.out and "0.5" in told.out
    assert "16" in told.out and "0.002" in told.out


def test_status_refuses_unknown_columns_and_answers_machines(ask: Asker) -> None:
    trained(ask.folder, "done")
    (sentence,) = ask.refused("status", "done", "--show", "grad_nrom,optimizer.lrr")[1:]
    assert "optimizer.lrr: no run has such a column or key; did you mean" in sentence and "lr" in sentence
    (status,) = json.loads(ask("status", "done", "format=json", "--show", "lr").out)
    assert status["state"] == "finished" and status["show"] == {"lr": "0.00025"}


def test_logs_show_training_not_the_result(ask: Asker) -> None:
    run = trained(ask.folder, "done")
    log = run.stage("sft").logs / "node-0.attempt-1.log"
    log.parent.mkdir()
    steps = [f"step {step}/90  loss 1.0" for step in range(90)]
    result = json.dumps(read_json(run.stage("sft").result), indent=2)
    log.write_text("\n".join([*steps, "Loading weights:  50%|###  | 1/2", "warning: slow disk", result, '{"a": 1}']))
    told = ask("logs", "done").out.splitlines()
    assert told[-3:] == ["step 89/90  loss 1.0", "warning: slow disk", '{"a": 1}'] and len(told) == 42
    assert told[0].startswith("== sft: finished at step 4 of 4") and told[1].startswith("... 52 earlier lines")
    assert ask("logs", "done", "-n", "2").out.splitlines()[-2:] == told[-2:]
    assert len(ask("logs", "-n", "0", "done").out.splitlines()) == 93
    assert ask.refused("logs", "done", "-n", "few")


def test_compare_shows_what_differs_and_nothing_else(ask: Asker) -> None:
    trained(ask.folder / "runs", "a", "stages.sft.optimizer.lr=1e-3")
    trained(ask.folder / "runs", "b", "stages.sft.optimizer.lr=1e-4", loss=1.25)
    told = ask("compare", "runs/a", "runs/b")
    lines = {line.split("  ")[0]: line.split()[-2:] for line in told.out.splitlines() if line.strip()}
    assert lines["stages.sft.optimizer.lr"] == ["0.001", "0.0001"] and "stages.sft.optimizer.beta1" not in told.out
    assert lines["loss after"] == ["1.0000", "1.2500"] and lines["loss before"] == ["2.0000", "2.0000"]
    assert lines["state"] == ["proven", "proven"] and "1.2000 (step 2)" in told.out and "warning" not in told.out
    assert ask("compare", "runs").out == told.out
    found = json.loads(ask("compare", "runs", "format=json").out)
    assert found["keys"] == {"stages.sft.optimizer.lr": {"a": 0.001, "b": 0.0001}}
    assert found["runs"][1]["stages"]["sft"]["after"]["loss"] == 1.25


def test_many_runs_fit_the_terminal(ask: Asker) -> None:
    for number in range(7):
        trained(ask.folder / "runs", f"sweep-lr_0.00{number}", f"stages.sft.optimizer.lr=0.00{number + 1}")
    told = ask("compare", "runs").out
    assert max(map(len, told.splitlines())) <= 80 and all(f"0.00{number + 1}" in told for number in range(7))


@pytest.mark.parametrize(
    ("digests", "held_out", "reason"),
    [
        (DIGESTS | {"tokenizer": "t2"}, "rows2", "different tokenizers"),
        (DIGESTS | {"base": "b2"}, "rows1", "different base models"),
        (DIGESTS, "rows2", "different held-out rows"),
        ({}, "rows1", "recorded no digests"),
    ],
)
def test_losses_that_mean_something_else_are_named(
    digests: dict[str, str], held_out: str, reason: str, ask: Asker
) -> None:
    trained(ask.folder, "a")
    other = trained(ask.folder, "b", held_out=held_out)
    write_json(other.stage("sft").result, read_json(other.stage("sft").result) | {"digests": digests})
    if not digests:
        write_json(other.stage("sft").prepared, {"evaluation": "/cache/data/rows1"})
    told = " ".join(ask("compare", "a", "b").out.split())
    assert "warning: sft:" in told and reason in told


def test_moved_unfinished_and_old_runs_are_compared(ask: Asker) -> None:
    trained(ask.folder / "one", "a").root.rename(ask.folder / "moved")
    other = write_run(ask.folder / "two", "a")
    stop(other.stage("sft"), why="time was over")
    record = read_json(other.run)
    del record["config"]["stages"]["sft"]["optimizer"]["head_lr"]  # an older version knew no such key
    write_json(other.run, record)
    told = " ".join(ask("compare", "moved", "two/a").out.split())
    assert "stages.sft.optimizer.head_lr null (no such key)" in told and "a: stopped: time was over" in told


def test_what_is_no_run_is_named(ask: Asker) -> None:
    trained(ask.folder, "a")
    (ask.folder / "empty").mkdir()
    assert ask.refused("compare", "a", "empty") == (
        "empty is not a run folder: neither run.json nor NAME/run.json is in it",
    )
    assert "a is the only one" in ask.refused("compare", "a", "a")[0]
    (ask.folder / "torn").mkdir()
    (ask.folder / "torn" / "run.json").write_text("{")
    assert "torn/run.json is damaged" in ask.refused("compare", "a", "torn")[0]


def test_a_damaged_line_costs_no_more_than_itself(ask: Asker) -> None:
    run = trained(ask.folder, "a")
    trained(ask.folder, "b")
    files = run.stage("sft")
    files.result.unlink()
    stop(files)
    log = files.logs / "node-0.attempt-1.log"
    log.parent.mkdir()
    log.write_text("step 4/4\n")
    for file in (files.metrics, files.events):
        first, *rest = file.read_text().splitlines(keepends=True)
        file.write_text("".join([first, '{"step": 1, "at\n', *rest]))
    for words in (["status", "a"], ["logs", "a"], ["compare", "a", "b", "format=json"]):
        told = ask(*words)
        text = " ".join((*told.errors, *told.out.split()))
        assert (
            told.code == 0 and f"{files.events}:2 is not a JSON object" in text and f"{files.metrics}:2 is" in text
        ), told
    assert "stopped" in ask("status", "a").out and "4/4" in ask("status", "a").out
    for damage in ('{"attempt": 1, "st', '{"attempt": 1}', "[]"):
        files.attempt(1).write_text(damage)
        told = ask("status", "a")
        assert told.code == 0 and any(f"{files.attempt(1)} is damaged" in line for line in told.errors), told
        assert "lost" in told.out and "attempt 1 ended" in told.out


def test_status_of_a_resumed_attempt_is_its_own(ask: Asker) -> None:
    """Steps after the checkpoint are lost with the attempt that made them."""
    run = write_run(ask.folder, "run")
    files = run.stage("sft")
    write_training(files, [2.0, 1.9, 1.8, 1.7, 1.6], evaluations={0: 2.0, 4: 1.65})
    stop(files, step=5)
    (files.logs / "attempt-1").mkdir(parents=True)
    assert (shown := status_of(run)).step == 5 and shown.loss == 1.6 and shown.eval_loss == 1.65
    files.checkpoint(2).mkdir(parents=True)
    (files.logs / "attempt-2").mkdir()
    waiting = status_of(run)
    assert (waiting.step, waiting.loss, waiting.eval_loss) == (2, 1.9, 2.0)
    assert waiting.eta_seconds is None and waiting.tokens_per_second is None
    with RecordFile(files.events) as events:
        events.append({"event": "resume", "attempt": 2, "step": 3})
    assert status_of(run).step == 3, "what it took decides, whatever was there to take"
    with RecordFile(files.metrics) as metrics:
        metrics.append({"step": 4, "attempt": 2, "loss": 9.0, "step_seconds": 7.0, "tokens_per_second": 5.0})
    own = status_of(run)
    assert (own.step, own.loss, own.eval_loss, own.eta_seconds, own.tokens_per_second) == (4, 9.0, 2.0, 7.0, 5.0)


def status_of(run: RunFolder) -> StageStatus:
    (status,) = stage_statuses([run])
    return status

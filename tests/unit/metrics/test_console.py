"""What a person sees of a run: plain lines and the live bar, from the files alone."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from orchestrator.metrics.console import Progressed, duration, line
from orchestrator.metrics.display import PhaseLines, StageView, left_seconds, show_progress, view_of_stage
from orchestrator.metrics.jsonl import RecordFile
from orchestrator.metrics.phases import Phase, Report

TRAINING = {
    "step": 12, "attempt": 1, "epoch": 0.4, "loss": 1.23456, "grad_norm": 0.51234, "lr": 2e-4, "tokens": 9000,
    "trained_tokens": 4000, "tokens_per_second": 3210.4, "step_seconds": 2.0, "data_seconds": 0.01, "memory_gib": 12.34, "mfu": None,
}  # fmt: skip


def test_a_training_row_is_one_line() -> None:
    assert line(TRAINING, 60) == (
        "step 12/60  epoch 0.40  loss 1.2346  grad_norm 0.512  lr 2.00e-04  3,210 tokens/s  12.3 GiB"
    )


def test_an_evaluation_row_and_a_row_with_nan() -> None:
    assert line({"step": 20, "attempt": 1, "eval_loss": 1.5}, 60) == "step 20/60  eval_loss 1.5000"
    assert line({"step": 21, "attempt": 1, "loss": float("nan")}, 60) == "step 21/60  loss nan"


def test_an_event_is_one_line_with_its_facts() -> None:
    event = {"event": "save", "time": "12:00:01", "step": 20, "save_seconds": 0.239958, "message": "checkpoint proven"}
    assert line(event, 60) == "12:00:01 save at step 20: checkpoint proven  save_seconds=0.24"
    assert (
        line({"event": "space", "free_bytes": 3 << 29, "parameters": 139399488}, 60)
        == "space  free=1,536.0 MiB  parameters=139,399,488"
    )
    assert line({"event": "start", "time": 0.0}, 60).endswith("start")


def test_the_eta_is_the_steps_left_times_the_usual_step_time() -> None:
    seen = Progressed()
    assert seen.eta_seconds(60) is None
    for step, seconds in [(1, 30.0), (2, 2.0), (3, 2.0)]:
        seen.take({**TRAINING, "step": step, "step_seconds": seconds})
    assert seen.eta_seconds(60) == 57 * 2.0
    seen.take({**TRAINING, "step": 2, "attempt": 2})
    assert seen.step == 2, "a replayed step is work to do again"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599, 3661)] == ["00:00", "01:00", "59:59", "1:01:01"]


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = _show(tmp_path, terminal=False)
    assert out.splitlines() == [
        "sft: starting the processes",
        "sft: training",
        "start at step 2",
        line({**TRAINING, "step": 3}, 4),
        line({**TRAINING, "step": 4}, 4),
        "sft: last evaluation",
        "step 4/4  eval_loss 0.9000",
        "sft: proof",
        "stop: done [all] :smile:",
    ]


def test_the_live_bar_on_a_terminal(tmp_path: Path) -> None:
    out = _show(tmp_path, terminal=True)
    assert "sft" in out and "4/4 steps" in out and "3,210 tokens/s" in out and "loss 1.2346" in out
    for phase in ("sft: starting the processes", "sft: training", "sft: last evaluation", "5/9 rows", "sft: proof"):
        assert phase in out, phase
    assert "eval_loss 0.9000" in out and "stop: done [all] :smile:" in out
    assert "ETA 00:00" not in out, "it would stand there for as long as the proof takes"


def test_a_narrow_terminal_keeps_phase_count_and_clock(tmp_path: Path) -> None:
    out = _show(tmp_path, terminal=True, width=80)
    assert "sft: training" in out and "5/9 rows" in out and "ETA" in out and "\u2026" not in out


def test_a_long_phase_is_heard_of_again_where_there_is_no_terminal(tmp_path: Path) -> None:
    view = _view(tmp_path)
    lines = PhaseLines(view)
    assert lines.new(time.time()) == ["sft: starting the processes"]
    write_report(tmp_path, "proof", done=5, total=9)
    assert lines.new(time.time()) == ["sft: training", "sft: proof"]
    assert lines.new(time.time()) == []
    (later,) = lines.new(time.time() + 30)
    assert later.startswith("sft: proof, 5 of 9 rows, 3"), later


def test_phases_of_an_attempt_that_is_over_are_not_those_of_the_new_one(tmp_path: Path) -> None:
    write_report(tmp_path, "proof")
    assert PhaseLines(_view(tmp_path, since=time.time() + 1)).new(time.time()) == ["sft: starting the processes"]
    assert PhaseLines(_view(tmp_path, since=0.0)).new(time.time()) == ["sft: training", "sft: proof"], "it is joined"


def test_the_time_left_counts_evaluation_and_proof() -> None:
    seen = Progressed(total_steps=10)
    seen.take({**TRAINING, "step": 8})
    known = {"importing the libraries": 5.0, "loading the model": 3.0, "first evaluation": 20.0, "training": 16.0}
    report = Report(attempt=1, began=0.0, seconds=known)
    assert left_seconds(seen, report, 100.0) == 2 * 2.0 + 20 + 8
    known["last evaluation"] = 0.0
    seen.take({**TRAINING, "step": 10})
    evaluating = replace(report, now=Phase(name="last evaluation", began=95.0))
    assert left_seconds(seen, evaluating, 100.0) == 15 + 8
    proving = replace(report, now=Phase(name="proof", began=98.0))
    assert left_seconds(seen, proving, 100.0) == 6
    scoring = replace(report, now=Phase(name="scoring", began=80.0, done=2, total=5, unit="rows"))
    assert left_seconds(Progressed(), scoring, 100.0) == 30.0


def _view(folder: Path, *, since: float = 0.0) -> StageView:
    files = {f"{name}_file": folder / f"{name}.jsonl" for name in ("metrics", "events")}
    return view_of_stage("sft", **files, phases_file=folder / "phases.json", total_steps=4, since=since)


def write_report(folder: Path, name: str, *, done: int | None = None, total: int | None = None) -> None:
    """The file as a rank would have it in a phase after training."""
    now = Phase(name=name, began=time.time(), done=done, total=total, unit="rows" if total else "")
    seconds = dict.fromkeys(("training", name), 1.0)
    report = Report(attempt=1, began=time.time(), now=now, seconds=seconds)
    (folder / "phases.json").write_text(json.dumps(asdict(report)))


def _show(folder: Path, *, terminal: bool, width: int = 160) -> str:
    """The output of a job that had two steps behind it, and writes two more while it is watched."""
    metrics, events = RecordFile(folder / "metrics.jsonl"), RecordFile(folder / "events.jsonl")
    events.append({"event": "start"})
    for step in (1, 2):
        metrics.append({**TRAINING, "step": step})
    view = _view(folder, since=time.time())
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=width, color_system=None)
    show_progress(view, _job(folder, metrics, events), console=console)
    return buffer.getvalue()


def _job(folder: Path, metrics: RecordFile, events: RecordFile) -> Callable[[], bool]:
    """A job that gets on by one stroke whenever somebody asks whether it runs."""

    def strokes() -> Iterator[bool]:
        yield True
        write_report(folder, "training")
        events.append({"event": "start", "step": 2})
        yield True
        metrics.append({**TRAINING, "step": 3})
        yield True
        metrics.append({**TRAINING, "step": 4})
        yield True
        write_report(folder, "last evaluation", done=5, total=9)
        metrics.append({"step": 4, "attempt": 1, "eval_loss": 0.9})
        yield True
        write_report(folder, "proof")
        yield True
        events.append({"event": "stop", "message": "done [all] :smile:"})
        yield False

    job = strokes()
    return lambda: next(job)

"""What a person sees of a run: plain lines and the live bar, from the files alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from orchestrator.metrics.console import Progressed, duration, line, show_progress, view_of_stage
from orchestrator.metrics.jsonl import RecordFile

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
        "start at step 2",
        line({**TRAINING, "step": 3}, 4),
        line({**TRAINING, "step": 4}, 4),
        "step 4/4  eval_loss 0.9000",
        "stop: done [all] :smile:",
    ]


def test_the_live_bar_on_a_terminal(tmp_path: Path) -> None:
    out = _show(tmp_path, terminal=True)
    assert "sft" in out and "4/4" in out and "3,210 tokens/s" in out and "loss 1.2346" in out
    assert "eval_loss 0.9000" in out and "ETA 00:00" in out
    assert "stop: done [all] :smile:" in out


def _show(folder: Path, *, terminal: bool) -> str:
    """The output of a job that had two steps behind it, and writes two more while it is watched."""
    metrics, events = RecordFile(folder / "m.jsonl"), RecordFile(folder / "e.jsonl")
    events.append({"event": "start"})
    for step in (1, 2):
        metrics.append({**TRAINING, "step": step})
    view = view_of_stage("sft", metrics_file=folder / "m.jsonl", events_file=folder / "e.jsonl", total_steps=4)
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=160, color_system=None)
    show_progress(view, _job(metrics, events), console=console)
    return buffer.getvalue()


def _job(metrics: RecordFile, events: RecordFile) -> Callable[[], bool]:
    """A job that gets on by one stroke whenever somebody asks whether it runs."""

    def strokes() -> Iterator[bool]:
        events.append({"event": "start", "step": 2})
        yield True
        metrics.append({**TRAINING, "step": 3})
        yield True
        metrics.append({**TRAINING, "step": 4})
        metrics.append({"step": 4, "attempt": 1, "eval_loss": 0.9})
        yield True
        events.append({"event": "stop", "message": "done [all] :smile:"})
        yield False

    job = strokes()
    return lambda: next(job)

"""A user's metrics and callbacks in real runs: on two ranks, and over a classifier's predictions."""

from __future__ import annotations

import json
from pathlib import Path

import classification_runs
import pytest
import tiny_model
from bench import Bench, Done, make_bench

from orchestrator.metrics.jsonl import read_rows

CODE = """
import json, pathlib
def seen(samples, folder):
    rows = [{"prompt": s.prompt, "completion": s.completion, "tokens": s.tokens, "row": dict(s.row)} for s in samples]
    pathlib.Path(folder, "samples.json").write_text(json.dumps(rows))
    return {"answered": len(samples), "right": sum(s.completion == s.row.get("label") for s in samples) / len(samples)}
def note(event, values, folder, stop_at=0):
    with open(pathlib.Path(folder, "events.txt"), "a") as file:
        print(event, values.get("step", "-"), file=file)
    return "stop" if event == "step" and values["step"] == stop_at else None
def broken(event, values):
    raise OSError("no network")
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("extensions"))
    (bench.root / "mine.py").write_text(CODE)
    return bench


@pytest.fixture(scope="module")
def stopped(bench: Bench) -> Done:
    """Two ranks, a callback that asks to stop after step 3 and one that fails."""
    options = f"options: {{folder: '{bench.root}'}}"
    return bench.run(
        "ranks",
        "cluster.processes_per_node=2",
        f"stages.sft.metrics.functions=[{{source: 'mine.py:seen', {options}}}]",
        "stages.sft.metrics.rows=5",
        "stages.sft.metrics.max_new_tokens=3",
        "stages.sft.evaluate_every_steps=3",
        "stages.sft.callbacks=[{source: 'mine.py:broken'},"
        f"{{source: 'mine.py:note', options: {{folder: '{bench.root}', stop_at: 3}}}}]",
    )


def test_metrics_see_the_answers_of_all_ranks_in_the_order_of_the_rows(bench: Bench, stopped: Done) -> None:
    rows = [row for row in read_rows(stopped.sft.metrics) if "eval_loss" in row]
    assert [(row["step"], row["eval_answered"]) for row in rows] == [(0, 5.0), (3, 5.0)]
    samples = json.loads((bench.root / "samples.json").read_text())
    held = [json.loads(text) for text in (bench.root / "held_out.jsonl").read_text().splitlines()]
    assert [sample["row"]["answer"] for sample in samples] == [row["output"] for row in held[:5]]
    assert all(row["instruction"] in sample["prompt"] for sample, row in zip(samples, held, strict=False))
    assert all(0 < sample["tokens"] <= 3 for sample in samples)


def test_a_callback_stops_the_stage_on_all_ranks_and_the_step_is_saved(bench: Bench, stopped: Done) -> None:
    assert stopped.code == 75, stopped.told
    assert "saved at step" in stopped.out and "mine.py:note asked for it at step" in stopped.out
    events = (bench.root / "events.txt").read_text().splitlines()
    assert events[0].startswith("start ") and {"evaluation 0", "step 1", "step 2", "step 3", "evaluation 3"} <= set(
        events
    )
    assert len([event for event in events if event.startswith("step ")]) <= 4  # one step may be under way


def test_a_failing_callback_is_named_once_and_stops_nothing(stopped: Done) -> None:
    log = next(stopped.sft.logs.glob("node-0.attempt-1.log")).read_text()
    assert log.count("mine.py:broken failed at start: OSError: no network (line 12 of") == 1


def test_metrics_of_a_classifier_see_predictions_and_labels(tmp_path: Path) -> None:
    classification_runs.write_sets(tmp_path)
    tiny_model.write_llama(tmp_path / "model")
    (tmp_path / "mine.py").write_text(CODE)
    bench = Bench(root=tmp_path)
    functions = f"stages.classify.metrics.functions=[{{source: 'mine.py:seen', options: {{folder: '{tmp_path}'}}}}]"
    ended = bench.run(
        "", words=classification_runs.words_of(tmp_path, "classes", functions, "stages.classify.max_steps=2")
    )
    assert ended.code == 0, ended.told
    rows = read_rows(tmp_path / "runs" / "classes" / "classify" / "metrics.jsonl")
    last = [row for row in rows if "eval_right" in row][-1]
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert last["eval_answered"] == len(samples) == 15
    assert last["eval_right"] == pytest.approx(last["eval_accuracy"])  # the tool's own measure of the same rows

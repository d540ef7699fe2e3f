"""`profile=true`: where a step's time goes, in metrics.jsonl and in the stage's folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from bench import Done, make_bench

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.training.profiler import SPANS


def traced_names(file: Path) -> set[str]:
    with gzip.open(file, "rt", encoding="utf-8") as text:
        return {str(event.get("name")) for event in json.load(text)["traceEvents"]}


def training_rows(done: Done) -> list[dict[str, Any]]:
    return [dict(row) for row in read_rows(done.sft.metrics) if "loss" in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Done]:
    """The same run with and without a profile."""
    bench = make_bench(tmp_path_factory.mktemp("profile"))
    words = ("launcher=local", "stages.sft.evaluate_every_steps=3")
    return bench.run("profiled", *words, "profile=true"), bench.run("plain", *words)


def test_every_part_of_a_step_is_told_and_they_fit_into_it(plain: tuple[Done, Done]) -> None:
    done, _ = plain
    done.result()
    told = read_json(done.sft.profile / "attempt-1.rank-0.breakdown.json")
    seconds = told["seconds_a_step"]
    assert told["steps"] == 6
    assert seconds.keys() == {*SPANS, "other", "step"}
    assert all(seconds[name] > 0 for name in ("data", "forward", "backward", "optimizer", "evaluation", "saving"))
    assert sum(seconds[name] for name in (*SPANS, "other")) == pytest.approx(seconds["step"])
    for row in training_rows(done):
        inside = sum(row[f"profile_{name}_seconds"] for name in ("data", "forward", "backward", "optimizer"))
        assert 0 < inside <= row["step_seconds"]
    (event,) = (row for row in read_rows(done.sft.events) if row["event"] == "profile")
    assert event["seconds"] == seconds["step"]
    assert f"forward={event['forward']}" in done.told


def test_the_trace_shows_the_spans_of_the_steps_after_the_warm_up(plain: tuple[Done, Done]) -> None:
    done, _ = plain
    names = traced_names(done.sft.profile / "attempt-1.rank-0.trace.json.gz")
    assert {"orchestrator.forward", "orchestrator.backward", "orchestrator.optimizer", "aten::mm"} <= names
    assert {name for name in names if name.startswith("ProfilerStep#")} == {
        f"ProfilerStep#{step}" for step in (3, 4, 5)
    }
    assert "aten::mm" in (done.sft.profile / "attempt-1.rank-0.operators.txt").read_text()


def test_a_profile_changes_no_loss_and_without_it_nothing_is_written(plain: tuple[Done, Done]) -> None:
    done, without = plain
    assert done.losses() == without.losses()
    assert not without.sft.profile.exists()
    assert not any(name.startswith("profile_") for row in training_rows(without) for name in row)


def test_two_ranks_under_deepspeed_have_a_trace_each_with_update_and_collectives(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    words = ("cluster.processes_per_node=2", "sharding=zero2", "profile=true", "stages.sft.max_steps=4")
    done = bench.run("zero2", *words)
    done.result()
    assert read_json(done.sft.profile / "attempt-1.rank-0.breakdown.json")["seconds_a_step"]["optimizer"] > 0
    for rank in (0, 1):
        names = traced_names(done.sft.profile / f"attempt-1.rank-{rank}.trace.json.gz")
        assert "orchestrator.optimizer" in names
        assert any(name.startswith(("gloo:", "c10d::")) for name in names)
        text = (done.sft.profile / f"attempt-1.rank-{rank}.operators.txt").read_text()
        assert float(text.split(": ")[1].split()[0]) > 0

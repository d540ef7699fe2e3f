"""Early stopping: when it ends a run, what it puts back, and that a resume comes to the same end."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, Done, make_bench
from safetensors.torch import load_file

from orchestrator.config.training import EarlyStoppingConfig
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder import checkpoints
from orchestrator.training.early_stopping import NOT_STOPPING, Stopping, after_evaluation, metric_of
from orchestrator.training.evaluation import Evaluation

STOPPING = (
    "stages.sft.early_stopping={metric: eval_loss, mode: min, patience: 2, min_delta: 0.0}",
    "stages.sft.evaluate_every_steps=2",
    "stages.sft.checkpoint.every_steps=3",
    "stages.sft.checkpoint.keep_last=1",
    "stages.sft.max_steps=40",
    "schedule@stages.sft.schedule=constant",
    "stages.sft.optimizer.lr=0.05",
    "sharding=zero2",
    "cluster.processes_per_node=2",
    "launcher=torchrun",
)
"""A rate so high that the held-out loss soon rises again."""


def settings(**changes: Any) -> EarlyStoppingConfig:
    whole = {"metric": "eval_loss", "mode": "min", "patience": 2, "min_delta": 0.0}
    return EarlyStoppingConfig.model_validate({**whole, **changes})


def recipe(values: list[float], **changes: Any) -> list[Stopping]:
    states = [NOT_STOPPING]
    for place, value in enumerate(values, start=1):
        states.append(after_evaluation(states[-1], 10 * place, value, settings(**changes)))
    return states[1:]


def test_patience_counts_evaluations_without_gain() -> None:
    ended = recipe([3.0, 2.0, 2.5, 2.1])
    assert [state.is_over for state in ended] == [False, False, False, True]
    assert (ended[-1].best_step, ended[-1].best_value) == (20, 2.0)
    assert [state.without_gain for state in recipe([3.0, 3.5, 2.0, 2.5])] == [0, 1, 0, 1], "a gain begins anew"


def test_the_other_way_and_the_least_gain() -> None:
    assert recipe([0.5, 0.6, 0.4], mode="max")[-1].best_step == 20
    assert [state.best_step for state in recipe([3.0, 2.95, 2.8], min_delta=0.1)] == [10, 10, 30]
    assert recipe([3.0, 2.9], min_delta=0.2)[-1].without_gain == 1


def test_what_is_not_finite_is_no_gain() -> None:
    ended = recipe([math.nan, 2.0, math.nan, math.inf])
    assert [state.best_step for state in ended] == [None, 20, 20, 20] and ended[-1].is_over


def test_an_unknown_metric_is_refused_with_those_that_are_there() -> None:
    scored = Evaluation(loss=1.0, trained_tokens=1, rows=1, measures={"accuracy": 0.5})
    assert metric_of(scored, settings(metric="eval_accuracy"), stage="sft") == 0.5
    with pytest.raises(ConfigError, match=r"eval_acuracy is not a result .*; there are eval_loss, eval_accuracy"):
        metric_of(scored, settings(metric="eval_acuracy"), stage="sft")
    with pytest.raises(ConfigError, match="no held-out rows"):
        metric_of(None, settings(), stage="sft")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def straight(bench: Bench) -> Done:
    return bench.run("straight", *STOPPING)


def _evaluations(done: Done) -> dict[int, float]:
    return {
        int(str(row["step"])): float(str(row["eval_loss"])) for row in read_rows(done.sft.metrics) if "eval_loss" in row
    }


def test_a_run_ends_early_with_its_best_weights(straight: Done) -> None:
    result, losses = straight.result(), _evaluations(straight)
    best, end = result["best_step"], result["stopped_early_at"]
    on_the_way = {step: loss for step, loss in losses.items() if step}
    assert best == min(on_the_way, key=lambda step: on_the_way[step]) and end == best + 4 == result["steps"] < 40
    assert max(losses) == end, "what is put back is not told as another row of the last step"
    assert result["eval_loss_after"] == pytest.approx(losses[best], abs=1e-6)
    assert result["proof"]["reopened_loss"] == pytest.approx(losses[best], abs=1e-3)
    (told,) = [row for row in read_rows(straight.sft.events) if row["event"] == "early_stop"]
    assert (told["step"], told["best_step"]) == (end, best)
    assert checkpoints.saved_steps(straight.sft) == [best, end], "the newest and the best"
    assert read_json(straight.sft.artifact / "MANIFEST.json")["step"] == best


def test_a_resume_comes_to_the_same_end(bench: Bench, straight: Done) -> None:
    """From the checkpoint of the best step, saved between two of `every_steps`: patience goes on from there."""
    best = straight.result()["best_step"]
    words = bench.words("again", *STOPPING)
    bench.run("again", words=words, verb="render")
    again = Done(code=0, out="", error="", folder=type(straight.folder)(bench.runs / "again"))
    shutil.copytree(straight.sft.checkpoint(best), again.sft.checkpoint(best))
    done = bench.run("again", words=words)
    keys = ("best_step", "stopped_early_at", "steps", "eval_loss_after")
    assert {key: done.result()[key] for key in keys} == {key: straight.result()[key] for key in keys}
    (resumed,) = [row for row in read_rows(done.sft.events) if row["event"] == "resume"]
    assert resumed["step"] == best
    assert _same_weights(straight.sft.artifact, done.sft.artifact)


def test_a_best_checkpoint_that_is_gone_is_told(bench: Bench, straight: Done) -> None:
    """From the last checkpoint, which says that training is over; the best one is missing."""
    end = straight.result()["stopped_early_at"]
    words = bench.words("gone", *STOPPING)
    bench.run("gone", words=words, verb="render")
    sft = type(straight.folder)(bench.runs / "gone").stage("sft")
    shutil.copytree(straight.sft.checkpoint(end), sft.checkpoint(end))
    done = bench.run("gone", words=words)
    result = done.result()
    assert (result["best_step"], result["stopped_early_at"]) == (None, end)
    assert [row["event"] for row in read_rows(sft.events)].count("best_lost") == 1
    assert not [row for row in read_rows(sft.metrics) if "loss" in row], "nothing was trained"
    assert result["eval_loss_after"] == pytest.approx(_evaluations(straight)[end], abs=1e-6)


def test_what_cannot_judge_is_refused_before_anything_starts(bench: Bench) -> None:
    done = bench.run("refused", *STOPPING, "stages.sft.evaluate_every_steps=null", verb="plan")
    assert done.code == 2 and "type stages.sft.evaluate_every_steps=50" in done.told
    done = bench.run("refused", *STOPPING, "stages.sft.data.eval.path=none", verb="plan")
    assert done.code == 2 and "there are no held-out rows" in done.told


def _same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

"""Studies through the command line: weak seeds stop and the others end as if never stopped; a search goes on after Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, make_bench

from orchestrator.composition.compose import compose
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import number_of, read_rows, step_of
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.studies.statistics import expected_best
from orchestrator.studies.trials import WrongMetric, metric_watch

SEEDS = (
    "study=seeds",
    "study.weights=[1,2]",
    "study.data=[1,2]",
    "study.stopping={share: 0.5, keep: 1}",
    "launcher=local",
)
SEARCH = (
    "-m",
    "study=optuna",
    "study.num_trials=3",
    "stages.sft.optimizer.lr=tag(log, interval(1e-5,1e-3))",
    "tuning.rank=4,8",
    "study.pruning={startup_trials: 1, after_step: 0}",
    "stages.sft.evaluate_every_steps=10",
    "stages.sft.max_steps=100",
    "launcher=local",
)
"""The second rate that the sampler draws is lower than the first, and behind it from the start."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("studies"))


def report_of(bench: Bench, name: str) -> dict[str, Any]:
    return read_json(bench.runs / f"{name}-study" / "report.json")


def evaluations(files: StageFolder) -> dict[int, float]:
    rows = [row for row in read_rows(files.metrics) if "eval_loss" in row]
    return {step_of(row): number_of(row, "eval_loss") or 0.0 for row in rows}


def test_a_metric_that_no_evaluation_writes_ends_the_first_trial_at_once(tmp_path: Path) -> None:
    config = compose(["+experiment=llama_lora", "study=seeds", "study.metric=eval_acuracy", f"output_dir={tmp_path}"])
    watch = metric_watch(config)
    files = RunFolder(tmp_path / config.name).stage("sft")
    files.root.mkdir(parents=True)
    assert watch("sft") is False, "no evaluation yet"
    row = {"step": 0, "eval_seconds": 0.1, "eval_trained_tokens": 9, "eval_loss": 1.5, "eval_accuracy": 0.5}
    files.metrics.write_text(json.dumps(row) + "\n")
    assert watch("dpo") is False, "another stage"
    with pytest.raises(
        WrongMetric, match=r"eval_acuracy is not a result of sft's evaluation; there are eval_loss, eval_accuracy$"
    ):
        watch("sft")


def test_weak_seeds_stop_and_the_best_ends_as_if_it_had_never_paused(bench: Bench) -> None:
    done = bench.run("luck", *SEEDS)
    assert done.code == 0, done.told
    report = report_of(bench, "luck")
    trials = report["trials"]
    names = [f"luck-weights_{w}-data_{d}" for w in (1, 2) for d in (1, 2)]
    assert [trial["name"] for trial in trials] == names and report["judged_at_step"] == 3
    halfway = [evaluations(RunFolder(bench.runs / name).stage("sft"))[3] for name in names]
    assert len(set(halfway)) == 4, "seeds of weights and of data both change the course"
    assert [trial["judged_value"] for trial in trials] == halfway
    best = min(trials, key=lambda trial: trial["judged_value"])
    assert [trial["state"] for trial in trials if trial is not best] == ["stopped as weak"] * 3
    assert [trial["steps"] for trial in trials if trial is not best] == [3] * 3
    assert (best["state"], best["steps"], report["best"]) == ("finished", 6, best["name"])
    assert report["expected_best"] == expected_best([trial["judged_value"] for trial in trials], mode="min")
    assert sum(source["share"] for source in report["variance"]) == pytest.approx(1.0)
    assert (bench.runs / "luck-study" / "report.png").read_bytes().startswith(b"\x89PNG")

    seeds = [f"{key}={value}" for key, value in best["values"].items()]
    alone = bench.run("alone", *seeds, "launcher=local", "stages.sft.evaluate_every_steps=3")
    assert alone.result()["eval_loss_after"] == best["value"]
    survivor = RunFolder(bench.runs / best["name"]).stage("sft")
    assert evaluations(survivor) == evaluations(alone.sft)
    adapter = Path("adapter_model.safetensors")
    assert (survivor.artifact / adapter).read_bytes() == (alone.sft.artifact / adapter).read_bytes()

    again = bench.run("luck", *SEEDS)
    assert again.code == 0 and "done already" in again.out and "log " not in again.out, again.told
    assert report_of(bench, "luck") == report
    refused = bench.run("luck", *SEEDS, "stages.sft.optimizer.lr=0.5")
    assert refused.code == 2 and "lr" in refused.error, refused.told


def test_a_search_goes_on_after_an_interrupt_and_its_results_are_those_of_its_runs(bench: Bench) -> None:
    argv = [sys.executable, "-m", "orchestrator", *bench.words("hunt", *SEARCH)]
    with subprocess.Popen(
        argv, cwd=bench.root, env=bench.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        claim = bench.runs / "hunt-trial_1" / "sft" / "logs" / "attempt-1" / "claim"
        while not claim.exists():
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        told = running.communicate()[0]
    assert running.returncode == 75 and "the same command continues the study" in told, told
    assert [trial["state"] for trial in report_of(bench, "hunt")["trials"]] == ["finished", "not ended"]

    done = bench.run("hunt", *SEARCH)
    assert done.code == 0, done.told
    report = report_of(bench, "hunt")
    assert [trial["state"] for trial in report["trials"][:2]] == ["finished", "stopped as weak"]
    curves = [evaluations(RunFolder(bench.runs / trial["name"]).stage("sft")) for trial in report["trials"]]
    for trial, curve in zip(report["trials"], curves, strict=True):
        run = RunFolder(bench.runs / trial["name"])
        config = read_json(run.run)["config"]
        assert config["stages"]["sft"]["optimizer"]["lr"] == float(trial["values"]["stages.sft.optimizer.lr"])
        assert config["tuning"]["rank"] == int(trial["values"]["tuning.rank"])
        assert config["study"] == {"kind": "none"}
        if trial["state"] == "finished":
            assert trial["value"] == read_json(run.stage("sft").result)["eval_loss_after"]
            continue
        assert trial["why"] == "worse than the median at step 10" and 10 <= trial["steps"] < 100, trial
        assert curve[10] > curves[0][10] and trial["value"] is None and not run.stage("sft").result.exists()
    results = {trial["name"]: trial["value"] for trial in report["trials"] if trial["value"] is not None}
    assert report["best"] == min(results, key=results.__getitem__)
    assert len(list((bench.runs / "hunt-trial_1" / "sft" / "attempts").glob("?.json"))) == 2, "it was taken up again"
    assert (bench.runs / "hunt-study" / "report.png").read_bytes().startswith(b"\x89PNG")
    told = bench.run("hunt", verb="report", words=[str(bench.runs / "hunt-study")])
    assert told.code == 0 and f"the best is {report['best']}" in told.out
    assert report_of(bench, "hunt") == report

    other = bench.run("hunt", *SEARCH, "tuning.alpha=4,8")
    assert other.code == 2 and "space" in other.error, other.told

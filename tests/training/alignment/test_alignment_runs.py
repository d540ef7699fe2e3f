"""Reward models, preference and policy optimisation, as a user runs them: ranks and shardings agree, stops lose nothing, limits end red."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import forking
import pytest
from alignment_runs import words_of, write_sets
from bench import Bench, Done, make_bench
from command_line import latest
from loading_code import check_scripts
from safetensors.torch import load_file

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import last_attempt_rows, read_rows
from orchestrator.run_folder.folder import RunFolder, read_result

SAMPLED = ("loss", "grad_norm", "reward", "kl", "entropy", "completion_tokens", "accuracy")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("alignment"))
    write_sets(bench.root)
    return bench


def run(bench: Bench, kind: str, name: str, *more: str) -> Done:
    return bench.run(name, words=words_of(bench, kind, name, *more))


def rows_of(done: Done, stage: str) -> list[dict[str, object]]:
    rows = last_attempt_rows(read_rows(done.folder.stage(stage).metrics))
    return [dict(row) for row in rows if "loss" in row]


def values(rows: Sequence[dict[str, object]], key: str) -> list[float]:
    return [float(str(row[key])) for row in rows if row.get(key) is not None]


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("reward", [("tuning=lora", "zero2")]),
        ("dpo", [("tuning=lora", "zero3")]),
        ("grpo", [("tuning=lora", "zero2"), ("tuning=lora", "zero3, by layer"), ("tuning=full", "zero3")]),
    ],
)
def test_two_ranks_do_what_one_does(bench: Bench, kind: str, cells: list[tuple[str, str]]) -> None:
    alone: dict[str, list[dict[str, object]]] = {}
    for tuning, sharding in cells:
        short = tuning.removeprefix("tuning=")
        if tuning not in alone:
            done = run(bench, kind, f"{kind}-{short}", tuning, "launcher=local")
            assert done.code == 0, done.told
            alone[tuning] = rows_of(done, kind)
        strategy, _, by_layer = sharding.partition(", ")
        two = ["launcher=torchrun", "cluster.processes_per_node=2", f"sharding={strategy}"]
        two += ["sharding.generate_by_layer=true"] if by_layer else []
        done = run(bench, kind, f"{kind}-{short}-{strategy}", tuning, *two)
        assert done.code == 0, done.told
        rows = rows_of(done, kind)
        assert len(rows) == 4
        for key in SAMPLED:
            expected = values(alone[tuning], key)
            assert values(rows, key) == pytest.approx(expected, rel=1e-4, abs=1e-5), (key, sharding)


def test_qlora_trains_a_reward_model_and_a_policy(bench: Bench) -> None:
    for kind in ("reward", "grpo"):
        done = run(bench, kind, f"qlora-{kind}", "quantization=nf4", "launcher=local", f"stages.{kind}.max_steps=2")
        assert done.code == 0, done.told
        assert all(map(math.isfinite, values(rows_of(done, kind), "loss")))


@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto"])  # with a reference, without one, over single rows
def test_a_preference_loss_falls(bench: Bench, loss: str) -> None:
    kind = "kto" if loss == "kto" else "dpo"
    choice = () if loss == "kto" else (f"stages.dpo.loss={loss}",)
    done = run(bench, kind, f"loss-{loss}", "launcher=local", "stages.dpo.max_steps=12", *choice)
    assert done.code == 0, done.told
    result = read_json(done.folder.stage("dpo").result)
    assert result["eval_loss_after"] < result["eval_loss_before"]
    if loss == "dpo":
        assert result["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
        rows = rows_of(done, "dpo")
        assert values(rows, "reward_chosen")[-1] > values(rows, "reward_rejected")[-1]


def test_a_reward_model_is_reported_and_loads_by_the_printed_words(bench: Bench) -> None:
    done = run(bench, "reward", "report", "launcher=local", "stages.reward.max_steps=8")
    assert done.code == 0, done.told
    result = read_result(done.folder.stage("reward"))
    report = result["reward_report"]
    assert report["pairs"] == 6 and 0 <= report["accuracy_low"] <= report["accuracy"] <= report["accuracy_high"] <= 1
    assert {"length_baseline", "words_baseline", "brier", "calibration_error", "length_pearson"} <= report.keys()
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    assert "AutoModelForSequenceClassification" in done.out
    base = AutoModelForSequenceClassification.from_pretrained(bench.model, num_labels=1)
    scorer = PeftModel.from_pretrained(base, result["artifact"]["path"])
    saved = load_file(f"{result['artifact']['path']}/adapter_model.safetensors")
    head = next(value for name, value in saved.items() if name.endswith("score.weight"))
    assert (scorer.base_model.model.score.modules_to_save["default"].weight == head).all()
    check_scripts(done.folder.stage("reward"), done.out)


def test_killed_between_two_steps_of_a_rollout_it_ends_as_if_nothing_had_happened(bench: Bench) -> None:
    more = (
        "launcher=local",
        "stages.grpo.max_steps=8",
        "stages.grpo.batch.global_size=4",
        "stages.grpo.checkpoint.every_steps=1",
        "stages.grpo.checkpoint.background=false",
    )
    straight = run(bench, "grpo", "straight", *more)
    assert straight.code == 0, straight.told
    argv = [sys.executable, "-m", "orchestrator", *latest(words_of(bench, "grpo", "killed", *more))]
    folder = RunFolder(bench.runs / "killed").stage("grpo")
    family = bench.environment(forking.FRESH)  # a fork is no descendant of the process that stands for it
    process = subprocess.Popen(argv, cwd=bench.root, env=family, start_new_session=True)
    deadline = time.monotonic() + 120
    while not folder.checkpoint(3).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert folder.checkpoint(3).exists()
    from launchers.process import descendants

    for child in [*descendants(process.pid), process.pid]:
        try:
            import os

            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    again = run(bench, "grpo", "killed", *more)
    assert again.code == 0, again.told
    assert {row["attempt"] for row in rows_of(again, "grpo")} == {1, 2}
    for key in ("loss", "reward", "grad_norm"):
        assert values(rows_of(again, "grpo"), key) == values(rows_of(straight, "grpo"), key)
    one, other = (
        load_file(done.folder.stage("grpo").artifact / "adapter_model.safetensors") for done in (straight, again)
    )
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_continuous_batching_trains_the_same_policy(bench: Bench) -> None:
    more = ("launcher=local", "stages.grpo.max_steps=2", "stages.grpo.rollout.generate_size=3")
    batch = run(bench, "grpo", "batch", *more)
    continuous = run(bench, "grpo", "continuous", *more, "stages.grpo.rollout.engine=continuous")
    for done in (batch, continuous):
        assert done.code == 0, done.told
    for key in ("loss", "reward", "kl", "entropy"):
        expected = values(rows_of(batch, "grpo"), key)
        assert values(rows_of(continuous, "grpo"), key) == pytest.approx(expected, abs=1e-4), key


def test_samples_and_health_are_recorded(bench: Bench) -> None:
    done = run(bench, "grpo", "health", "launcher=local", "stages.grpo.rollout.passes=2")
    assert done.code == 0, done.told
    rows = rows_of(done, "grpo")
    for row in rows:
        assert {
            "reward",
            "reward_letter_share",
            "kl",
            "entropy",
            "equal_groups_share",
            "generator_difference",
        } <= row.keys()
        assert float(str(row["generator_difference"])) < 1e-4, "generator and trainer compute the same policy"
    assert values(rows, "kl")[0] == pytest.approx(0, abs=1e-5)
    samples = [json.loads(line) for line in done.folder.stage("grpo").generated.read_text().splitlines()]
    assert len(samples) == 4 and {"prompt", "completion", "reward", "rewards", "advantage"} <= samples[0].keys()
    result = read_json(done.folder.stage("grpo").result)
    assert "eval_loss_after" in result and result["artifact"]["kind"] == "adapter"


def test_a_planted_length_hack_ends_red_within_fifty_updates(bench: Bench) -> None:
    more = (
        "tuning=full",
        "launcher=local",
        "stages.grpo.max_steps=50",
        "stages.grpo.optimizer.lr=5e-3",
        "stages.grpo.kl_coefficient=0",
        "stages.grpo.rollout={prompts: 8, group_size: 4, max_new_tokens: 40, passes: 1, temperature: 1.0}",
        "stages.grpo.batch.global_size=32",
        "stages.grpo.batch.micro_size=8",
        "stages.grpo.limits={length_growth: 1.5, kl: null, patience: 2}",
        f"stages.grpo.rewards=[{{source: '{bench.root}/rewards.py:longer_is_better', weight: 1.0, options: {{}}}}]",
        "stages.grpo.start_from=null",
    )
    brief = _brief_model(bench)
    done = run(bench, "grpo", "hacked", *more, f"model.base={brief}")
    assert done.code == 93, done.told
    assert "the reward is being hacked by length" in done.told
    assert not done.folder.stage("grpo").result.exists()
    assert len(rows_of(done, "grpo")) < 50


def _brief_model(bench: Bench) -> str:
    """A model that ends its answers soon: its head prefers the end token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bench.root / "brief"
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    with torch.no_grad():
        direction = model.model.norm(model.model.embed_tokens.weight).mean(0)
        model.lm_head.weight[2] += 4.0 * direction / direction.norm()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bench.model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("stages.grpo.rewards=[]",), "stages.grpo.rewards: there is none"),
        (
            ("stages.grpo.rewards=[{source: 'stage:nope', weight: 1.0, options: {}}]",),
            "nope is not a stage of kind reward",
        ),
        (("stages.grpo.rewards=[{source: exact_mach, weight: 1.0, options: {}}]",), "exact_match"),
        (
            ("stages.grpo.batch.global_size=6", "stages.grpo.batch.micro_size=1"),
            "is not a multiple of batch.global_size",
        ),
        (("stages.grpo.rollout.group_size=1",), "group_size"),
        (("stages.grpo.start_from=reward",), "reward is not a stage of kind sft or dpo or grpo"),
        (("stages.grpo.data.packing=best_fit",), "prompts are not packed"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(bench: Bench, words: tuple[str, ...], sentence: str) -> None:
    done = run(bench, "grpo", "refused", *words)
    assert done.code == 2 and sentence in done.error, done.told
    assert not done.folder.root.exists() and "Traceback" not in done.error

"""SFT -> reward -> GRPO -> evaluate -> merge from one command, as a user runs it: run, rerun, change, one stage, export."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from aligning import write_sets
from running import Bench, Done
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.rundir import RunFolder, read_json, read_manifest

STAGES = ("sft", "reward", "grpo", "evaluate", "merge")


def words(bench: Bench, *more: str) -> list[str]:
    pairs = "/pairs{}.jsonl"
    return [
        "+experiment=llama_rlhf",
        "name=pipeline",
        f"output_dir={bench.runs}",
        f"model.base={bench.model}",
        "model.dtype=float32",
        "tracking=none",
        "launcher=local",
        f"stages.sft.data.train.path={bench.root / 'rows.jsonl'}",
        f"stages.sft.data.eval.path={bench.root / 'held_out.jsonl'}",
        "stages.sft.max_steps=4",
        f"stages.reward.data.train.path={bench.root}{pairs.format('')}",
        f"stages.reward.data.eval.path={bench.root}{pairs.format('_held_out')}",
        "stages.reward.max_steps=4",
        f"stages.grpo.data.train.path={bench.root / 'prompts.jsonl'}",
        f"stages.grpo.data.eval.path={bench.root / 'prompts_held_out.jsonl'}",
        "stages.grpo.max_steps=2",
        "stages.grpo.accept_weak_reward=true",
        "stages.grpo.rollout={prompts: 4, group_size: 4, max_new_tokens: 12}",
        f"stages.evaluate.data.train.path={bench.root / 'held_out.jsonl'}",
        f"stages.merge.data.train.path={bench.root / 'held_out.jsonl'}",
        "stages.evaluate.rollout.max_new_tokens=12",
        *more,
    ]


def run(bench: Bench, *more: str, verb: str = "run") -> Done:
    return bench.run("pipeline", verb=verb, words=words(bench, *more))


@pytest.fixture(scope="module")
def pipeline(bench: Bench) -> Done:
    write_sets(bench.root)
    done = run(bench)
    assert done.code == 0, done.told
    return done


def results(folder: RunFolder, names: Sequence[str] = STAGES) -> dict[str, dict[str, object]]:
    return {name: read_json(folder.stage(name).result) for name in names}


def test_every_stage_is_proven_and_names_what_it_read(pipeline: Done) -> None:
    found = results(pipeline.folder)
    digests = {name: found[name]["artifact"]["manifest_sha256"] for name in STAGES}  # type: ignore[index]
    assert found["sft"]["inputs"] == {}
    assert found["reward"]["inputs"] == {"sft": digests["sft"]}
    assert found["grpo"]["inputs"] == {"sft": digests["sft"], "reward": digests["reward"]}
    assert found["evaluate"]["inputs"] == {"grpo": digests["grpo"], "reward": digests["reward"]}
    assert found["merge"]["inputs"] == {"grpo": digests["grpo"]}
    assert [found[name]["artifact"]["kind"] for name in STAGES] == [  # type: ignore[index]
        "adapter",
        "reward_adapter",
        "adapter",
        "report",
        "merged",
    ]
    scores = found["evaluate"]["scores"]
    assert scores["tuned"].keys() == scores["base"].keys() >= {"loss", "reward", "completion_tokens"}  # type: ignore[index]
    for name in STAGES:
        read_manifest(pipeline.folder.stage(name).artifact)


def test_the_merged_model_is_the_trained_one_and_stands_alone(pipeline: Done, bench: Bench) -> None:
    from peft import PeftModel

    folder = pipeline.folder.stage("merge").artifact
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(bench.model)
    trained = PeftModel.from_pretrained(base, str(pipeline.folder.stage("grpo").artifact))
    ids_BT = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids_BT).logits, trained(ids_BT).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    card = (folder / "README.md").read_text()
    assert "base_model:" in card and "| sft | sft | 4 |" in card and "device hours" in card and "KL" in card
    assert read_json(pipeline.folder.stage("merge").result)["kl"] < 1e-6


def test_a_rerun_runs_nothing(pipeline: Done, bench: Bench) -> None:
    again = run(bench)
    assert again.code == 0 and again.out.count("done already") == 5 and "anew" not in again.out


def test_a_change_reruns_only_what_depends_on_it(pipeline: Done, bench: Bench) -> None:
    before = results(pipeline.folder)
    changed = run(bench, "stages.reward.optimizer.lr=1e-3")
    assert changed.code == 0, changed.told
    assert "sft: done already" in changed.out
    after = results(pipeline.folder)
    assert [name for name in STAGES if after[name]["digest"] != before[name]["digest"]] == list(STAGES[1:])
    assert sorted(path.name for path in pipeline.folder.superseded.iterdir()) == [
        "evaluate-1",
        "grpo-1",
        "merge-1",
        "reward-1",
    ]
    last = run(bench, "stages.reward.optimizer.lr=1e-3", "stages.merge.rows=4")
    assert last.code == 0 and last.out.count("done already") == 4, last.told


def test_one_stage_and_from_a_stage(pipeline: Done, bench: Bench) -> None:
    same = ("stages.reward.optimizer.lr=1e-3", "stages.merge.rows=4")
    only = run(bench, *same, "--only", "merge")
    assert only.code == 0 and "merge: done already" in only.out
    anew = run(bench, *same, "--from", "evaluate")
    assert anew.code == 0, anew.told
    assert "evaluate: is run anew" in anew.out and "merge" not in anew.out.split("is run anew", 1)[1].split("\n")[0]
    early = bench.run("early", words=[*words(bench, *same, "--only", "grpo"), "name=early"])
    assert early.code == 2 and "not done yet, and needed by grpo" in early.error, early.told
    unknown = run(bench, *same, "--from", "polish")
    assert unknown.code == 2 and "no stage of this pipeline" in unknown.error


def test_a_weak_reward_model_is_refused_before_the_policy_is_trained(pipeline: Done, bench: Bench) -> None:
    name = "weak"
    shutil.copytree(pipeline.folder.root, bench.runs / name, dirs_exist_ok=True)
    for stage in ("grpo", "evaluate", "merge"):
        shutil.rmtree(bench.runs / name / stage)
    same = ("stages.reward.optimizer.lr=1e-3", "stages.merge.rows=4", f"name={name}")
    result = bench.runs / name / "reward" / "result.json"
    import json

    told = json.loads(result.read_text())
    told["reward_report"] |= {"accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8, "beats_chance": False}
    result.write_text(json.dumps(told))
    done = bench.run(name, words=[*words(bench, *same), "stages.grpo.accept_weak_reward=false"])
    assert done.code == 2 and "does not beat chance" in done.told, done.told


def test_export_writes_a_folder_to_publish(pipeline: Done, bench: Bench) -> None:
    root = str(pipeline.folder.root)
    done = bench.run("pipeline", verb="export", words=[root])
    assert done.code == 0, done.told
    target = pipeline.folder.root / "export"
    read_manifest(target)
    assert AutoModelForCausalLM.from_pretrained(target).config.vocab_size == 260
    other = bench.run("pipeline", verb="export", words=[root, "--stage", "reward"])
    assert other.code == 2 and "the stages that make a policy are sft, grpo" in other.error
    foreign = bench.root / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    refused = bench.run("pipeline", verb="export", words=[root, "--to", str(foreign)])
    assert refused.code == 2 and "was not made by export" in refused.error
    assert Path(foreign, "notes.txt").read_text() == "mine"


def test_check_looks_at_the_data_of_every_stage(pipeline: Done, bench: Bench) -> None:
    done = run(bench, verb="check")
    assert done.code == 0, done.told
    assert [line for line in done.out.splitlines() if line.startswith("stage ")] == [f"stage {name}" for name in STAGES]
    assert done.out.count("of a two-layer copy of the model get one") == 3


def test_generate_answers_with_the_last_policy(pipeline: Done, bench: Bench) -> None:
    done = bench.run(
        "pipeline", verb="generate", words=[str(pipeline.folder.root), "--prompt", "Say red", "--max-new-tokens", "4"]
    )
    assert done.code == 0 and "base" in done.out and "tuned" in done.out, done.told

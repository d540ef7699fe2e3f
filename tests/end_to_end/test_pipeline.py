"""SFT -> reward -> GRPO -> evaluate -> merge from one command, as a user runs it: run, rerun, change, one stage, export."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from alignment_runs import pipeline_words, write_sets
from bench import Bench, Done
from command_line import latest
from loading_code import carded_script, pasted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import read_manifest
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder.folder import RunFolder, StageFolder

STAGES = ("sft", "reward", "grpo", "evaluate", "merge")
SAVES = tuple(f"stages.{name}.checkpoint.every_steps=1" for name in ("sft", "reward", "grpo"))


def run(bench: Bench, *more: str, verb: str = "run") -> Done:
    return bench.run("pipeline", verb=verb, words=pipeline_words(bench, *more))


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


def test_results_carry_the_digests_of_their_content(pipeline: Done) -> None:
    told = [found["digests"] for found in results(pipeline.folder).values()]
    for one in told:
        assert one.keys() == {"base", "tokenizer", "template", "data", "code"}  # type: ignore[attr-defined]
    for what in ("base", "tokenizer", "template", "code"):
        assert len({one[what] for one in told}) == 1, what  # type: ignore[index]


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
    assert pasted(carded_script(folder), folder=folder).strip()


def is_in_its_middle(files: StageFolder) -> bool:
    """After the first step of a stage that trains; after the start of one that does not."""
    if files.root.name in ("evaluate", "merge"):
        return any(row["event"] == "start" for row in read_rows(files.events))
    return any(row.get("step") == 1 for row in read_rows(files.metrics))


def workers_of(folder: Path) -> list[int]:
    """Processes of the ranks: those that have run.json in their command line."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder / "run.json").encode() in words and b"orchestrator.worker" in words:
            found.append(int(process.name))
    return found


def test_killed_in_each_stage_it_ends_as_if_nothing_had_happened(pipeline: Done, bench: Bench) -> None:
    argv = [sys.executable, "-m", "orchestrator", *latest([*pipeline_words(bench), *SAVES, "name=killed"])]
    folder = RunFolder(bench.runs / "killed")
    for stage in STAGES:
        files = folder.stage(stage)
        with subprocess.Popen(
            argv, cwd=bench.root, env=bench.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as running:
            while not is_in_its_middle(files):
                assert running.poll() is None, running.stderr and running.stderr.read()
                time.sleep(0.01)
            for worker in workers_of(folder.root):
                os.kill(worker, signal.SIGKILL)
            assert running.wait() != 0
        assert not files.result.exists(), stage
        assert read_json(files.attempt(1))["state"] == "failed"
    last = bench.run("killed", words=[*latest([*pipeline_words(bench), *SAVES, "name=killed"])])
    assert last.code == 0 and last.out.count("done already") == 4, last.told
    for stage in ("sft", "reward", "grpo", "merge"):
        assert_same(pipeline.folder.stage(stage).artifact, folder.stage(stage).artifact)
    scores = [read_json(run.stage("evaluate").result)["scores"] for run in (pipeline.folder, folder)]
    assert scores[0] == scores[1]


def assert_same(one: Path, other: Path) -> None:
    """Every tensor of two artifacts, bit for bit."""
    files = sorted(one.glob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(file), load_file(other / file.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_rerun_runs_nothing(pipeline: Done, bench: Bench) -> None:
    again = run(bench)
    assert again.code == 0 and again.out.count("done already") == 5 and "is rerun" not in again.out


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


def test_other_rows_in_the_same_file_rerun_their_stage_alone(pipeline: Done, bench: Bench) -> None:
    """The evaluation's rows change, which nothing else reads; --only says why an input is missing."""
    same = ("stages.reward.optimizer.lr=1e-3", "stages.merge.rows=4")
    file = bench.root / "scored.jsonl"
    shutil.copy(bench.root / "held_out.jsonl", file)
    other = (*same, f"stages.evaluate.data.train.path={file}")
    assert run(bench, *other).code == 0
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    again = run(bench, *other)
    assert again.code == 0 and again.out.count("done already") == 4, again.told
    assert "evaluate: is rerun" in again.out
    template = bench.model / "chat_template.jinja"
    was = template.read_text() if template.exists() else None
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}")
    try:
        refused = run(bench, *other, "--only", "evaluate")
    finally:
        template.unlink() if was is None else template.write_text(was)
    assert refused.code == 2 and "was made from changed since" in refused.error, refused.told


def test_one_stage_and_from_a_stage(pipeline: Done, bench: Bench) -> None:
    same = ("stages.reward.optimizer.lr=1e-3", "stages.merge.rows=4")
    only = run(bench, *same, "--only", "merge")
    assert only.code == 0 and "merge: done already" in only.out
    anew = run(bench, *same, "--from", "evaluate")
    assert anew.code == 0, anew.told
    assert "evaluate: is rerun" in anew.out and "merge" not in anew.out.split("is rerun", 1)[1].split("\n")[0]
    early = bench.run("early", words=[*pipeline_words(bench, *same, "--only", "grpo"), "name=early"])
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
    done = bench.run(name, words=[*pipeline_words(bench, *same), "stages.grpo.accept_weak_reward=false"])
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

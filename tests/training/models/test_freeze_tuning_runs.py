"""Whole runs with tuning=freeze: the artifact is a model whose frozen part is the base's, and every later stage goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_model
import torch
from alignment_runs import pipeline_words, write_sets
from bench import Bench, Done, make_bench
from safetensors.torch import load_file

from orchestrator.files.atomic import read_json

FREEZE = ("tuning=freeze", "tuning.layers=last 1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("freezing"))
    write_sets(bench.root)
    tiny_model.write_llama(bench.root / "tied", tied=True)
    return bench


@pytest.fixture(scope="module")
def tied(bench: Bench) -> Done:
    """bfloat16 under ZeRO-3 on two ranks: the last layer, then the one matrix that head and embeddings are."""
    words = ("tuning.head=true", "tuning.unfreeze_every_steps=3", "model.dtype=bfloat16", "sharding=zero3")
    # norms begin at 1.0, where a bfloat16 is 0.4 % from the next: smaller steps are rounded away in the artifact
    words += ("stages.sft.optimizer.lr=5e-3",)
    ranks = ("cluster.processes_per_node=2", "launcher=torchrun", f"model.base={bench.root / 'tied'}")
    return bench.run("tied", *FREEZE, *words, *ranks)


def test_the_artifact_is_the_base_but_for_what_was_trained(bench: Bench, tied: Done) -> None:
    assert tied.result()["artifact"]["kind"] == "model"
    changed = _changed(bench.root / "tied", tied.sft.artifact, torch.bfloat16)
    assert len(changed) == 10 and all(".layers.1." in name or "embed_tokens" in name for name in changed)
    assert read_json(tied.sft.artifact / "MANIFEST.json")["tuning"] == "freeze"


def test_others_load_it_and_it_generates(bench: Bench, tied: Done) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tied.sft.artifact)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    done = bench.run("tied", words=[str(tied.folder.root), "--examples", "1"], verb="generate")
    assert done.code == 0, done.told


def test_every_later_stage_goes_on_from_it(bench: Bench) -> None:
    words = [word for word in pipeline_words(bench, *FREEZE) if not word.startswith(("stages.merge", "pipeline="))]
    done = bench.run("pipeline", words=[*words, "pipeline=[sft,reward,grpo,evaluate]"])
    assert done.code == 0, done.told
    results = {name: read_json(done.folder.stage(name).result) for name in ("sft", "reward", "grpo", "evaluate")}
    assert [result["artifact"]["kind"] for result in results.values()] == ["model", "reward_model", "model", "report"]
    for name in ("sft", "reward", "grpo"):
        changed = _changed(bench.model, done.folder.stage(name).artifact, torch.float32)
        assert changed and all(".layers.1." in own or own == "score.weight" for own in changed), name
        assert ("score.weight" in changed) == (name == "reward"), "a new head is always trained"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("tuning.layers=last 3",), "tuning.layers: last 3, but the model has 2 layers; type tuning.layers=all"),
        (("tuning.layers=none",), "tuning: nothing is trained; choose layers, a switch or a pattern in tuning.also"),
        (("quantization=nf4",), "nf4 holds a frozen base and cannot be trained with tuning=freeze"),
        (("tuning.unfreeze_every_steps=1", "tuning.unfreeze_every_epochs=1"), "say the same thing twice"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(bench: Bench, words: tuple[str, ...], sentence: str) -> None:
    done = bench.run("refused", *FREEZE, *words, verb="plan")
    assert done.code == 2 and sentence in " ".join(done.told.split()), done.told


def _changed(base: Path, artifact: Path, dtype: torch.dtype) -> set[str]:
    """Names of an artifact whose values are not the base's."""
    before, after = load_file(base / "model.safetensors"), load_file(artifact / "model.safetensors")
    assert before.keys() - after.keys() <= {"lm_head.weight"}
    return {
        name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name].to(dtype))
    }

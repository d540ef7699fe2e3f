"""Every method under every sharding at two gloo ranks: the losses of one process, and artifacts that others load."""

from __future__ import annotations

import pytest
import tiny_model
import torch
from bench import Bench, Done, make_bench

from orchestrator.config.run import RunConfig
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows

METHODS = {"full": ("tuning=full",), "lora": ("tuning=lora",), "qlora": ("tuning=lora", "quantization=nf4")}
SHARDINGS = ("none", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def alone(bench: Bench) -> dict[str, list[float]]:
    """Per-step losses of one process without sharding."""
    return {method: _run(bench, method, "none", ranks=1).losses() for method in ("full", "lora")}


def _run(bench: Bench, method: str, sharding: str, *, ranks: int) -> Done:
    kind = "local" if ranks == 1 else "torchrun"
    words = (*METHODS[method], f"sharding={sharding}", f"cluster.processes_per_node={ranks}", f"launcher={kind}")
    done = bench.run(f"{method}-{sharding}-{ranks}", *words)
    assert done.code == 0, done.told
    return done


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one(bench: Bench, alone: dict[str, list[float]], method: str, sharding: str) -> None:
    done = _run(bench, method, sharding, ranks=2)
    losses = done.losses()
    assert len(losses) == 6
    if method in alone:
        assert losses == pytest.approx(alone[method], rel=1e-4)
    result = done.result()
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["proof"]["reopened_loss"] == pytest.approx(result["eval_loss_after"], abs=1e-3)
    _assert_others_load_it(bench, done, method)


@pytest.mark.parametrize("head", ["adapted", "tied"])
def test_a_gathered_head_under_zero3_is_the_one_of_one_process(bench: Bench, head: str) -> None:
    """The loss head reads its weight, and an adapter's on it, inside the module whose call gathers them."""
    if head == "tied":
        words = ("tuning=full", f"model.base={tiny_model.write_llama(bench.root / 'tied', tied=True)}")
    else:
        words = ("tuning=lora", "tuning.target_modules=[q_proj, lm_head]")
    short = (*words, "stages.sft.max_steps=3")
    alone = bench.run(f"{head}-alone", *short, "launcher=local")
    sharded = bench.run(f"{head}-zero3", *short, "launcher=torchrun", "cluster.processes_per_node=2", "sharding=zero3")
    assert alone.code == sharded.code == 0, alone.told + sharded.told
    assert sharded.losses() == pytest.approx(alone.losses(), rel=1e-4) and len(alone.losses()) == 3
    told = [str(row["head"]) for row in read_rows(sharded.sft.events) if row["event"] == "head"]
    assert len(told) == 1 and told[0].startswith("chunked")


def _assert_others_load_it(bench: Bench, done: Done, method: str) -> None:
    """By the words that the run itself prints: transformers for a model, PEFT for an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bench.model)
    ids_BT = torch.arange(3, 40)[None]
    with torch.no_grad():
        before_BTV = base(ids_BT).logits
        if method == "full":
            tuned = AutoModelForCausalLM.from_pretrained(done.sft.artifact)
        else:
            tuned = PeftModel.from_pretrained(base, str(done.sft.artifact))
        after_BTV = tuned(ids_BT).logits
    assert torch.isfinite(after_BTV).all()
    assert not torch.equal(before_BTV, after_BTV)


def test_the_deepspeed_dict_in_the_run_folder_is_the_configuration(bench: Bench) -> None:
    words = ("sharding=zero2", "cluster.processes_per_node=2", "stages.sft.optimizer.max_grad_norm=0.5")
    done = bench.run("dict", *words, verb="render")
    assert done.code == 0, done.told
    rendered = read_json(done.sft.deepspeed)
    config = RunConfig.model_validate(read_json(done.folder.run)["config"], strict=False)
    assert rendered["zero_optimization"]["stage"] == 2
    assert rendered["gradient_clipping"] == config.stages["sft"].optimizer.max_grad_norm == 0.5
    assert rendered["zero_optimization"]["reduce_bucket_size"] == config.sharding.bucket_elements == 1_000_000
    assert rendered["train_batch_size"] == 8 == 2 * 2 * rendered["gradient_accumulation_steps"]


def test_paged_states_train_as_the_others_do(bench: Bench) -> None:
    """On a CPU nothing is paged: the numbers must be those of the same states unpaged."""
    losses = {
        name: bench.run(
            name, "launcher=local", "stages.sft.max_steps=3", f"optimizer@stages.sft.optimizer={name}"
        ).losses()
        for name in ("adamw_8bit", "adamw_8bit_paged", "adamw_paged")
    }
    assert losses["adamw_8bit"] == losses["adamw_8bit_paged"] != []
    assert losses["adamw_paged"] == pytest.approx(losses["adamw_8bit"], rel=1e-3)


def test_bfloat16_gradient_checkpointing_and_8_bit_states_train(bench: Bench) -> None:
    words = (
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "optimizer@stages.sft.optimizer=adamw_8bit",
        "stages.sft.optimizer.lr=2e-3",
        "tuning.use_dora=true",
        "tuning.use_rslora=true",
        "launcher=local",
    )
    done = bench.run("switches", *words)
    assert done.result()["eval_loss_after"] < done.result()["eval_loss_before"]


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_in_sixteen_bits_the_artifact_scores_what_the_ranks_scored(bench: Bench, sharding: str) -> None:
    """To the bit: a buffer in another type (rotary frequencies) would show."""
    words = ("model.dtype=bfloat16", f"sharding={sharding}", "cluster.processes_per_node=2", "launcher=torchrun")
    proof = bench.run(f"sixteen-{sharding}", *words, "stages.sft.max_steps=2").result()["proof"]
    assert proof["reopened_loss"] == pytest.approx(proof["loss"], abs=1e-9)

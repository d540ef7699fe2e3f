"""What the plan names: attention and loss head of every training stage, and a `model.loss_head` that cannot be obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Asker

from orchestrator.architecture import kernels
from orchestrator.architecture.base_model import Base
from orchestrator.architecture.kernels import documents_path, head_kernel, head_problems, liger_problem
from orchestrator.composition.compose import compose
from orchestrator.config.model import Architecture
from orchestrator.errors import ConfigError
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.plan import make_plan

LORA = "+experiment=llama_lora"
H100 = ("cluster=h100x8", "stages.sft.batch.global_size=32")
TORCH = "chunked cross-entropy in plain torch ({}), on trained tokens only"
LIGER = "Liger's fused linear cross-entropy ({}), on trained tokens only"
BLOCKS = "documents: blocks by document, one by one where one is longer than 512 tokens (CPU, 16 bits)"
VARLEN = "documents: torch varlen_attn (CUDA, 16 bits)"
ONE_BY_ONE = "documents: torch sdpa, document by document ({} bits)"
PACKED = "stages.sft.data.packing=best_fit"
HALF = "model.dtype=bfloat16"


def planned(*words: str, has_liger: bool = False, **changes: Any) -> dict[str, tuple[str | None, str | None]]:
    """(attention, loss head) of every stage."""
    config = resolve(compose(list(words)), Path("/w"))
    assert config.model.preset is not None
    model = Architecture.model_validate({**config.model.preset.architecture.model_dump(), **changes})
    data = DataFacts(train_rows=100, evaluation_rows=0, format="alpaca", bytes=1, has_liger=has_liger)
    base = Base(source="hub", location="x", architecture=model)
    stages = make_plan(config, base=base, data=dict.fromkeys(config.pipeline, data)).stages
    return {stage.name: (stage.attention, stage.loss_head) for stage in stages}


@pytest.mark.parametrize(
    ("words", "has_liger", "attention", "head"),
    [
        (("cluster.device=cpu", PACKED, HALF), True, BLOCKS, TORCH.format("cpu")),
        (("cluster.device=cpu", PACKED, "model.dtype=float32"), False, ONE_BY_ONE.format("CPU, 32"), TORCH.format("cpu")),
        (("cluster.device=cpu", "stages.sft.data.packing=none", HALF), False, "sdpa (CPU, 16 bits)", TORCH.format("cpu")),
        ((*H100, PACKED), True, VARLEN, LIGER.format("cuda")),
        ((*H100, PACKED), False, VARLEN, TORCH.format("cuda")),
        ((*H100, PACKED, "cluster.device=auto"), True, VARLEN, LIGER.format("cuda")),
        ((*H100, PACKED, "model.loss_head=torch"), True, VARLEN, TORCH.format("cuda")),
        ((*H100, PACKED, "model.loss_head=liger"), True, VARLEN, LIGER.format("cuda")),
        ((*H100, PACKED, "model.dtype=float32"), True, ONE_BY_ONE.format("CUDA, 32"), LIGER.format("cuda")),
        ((*H100, PACKED, "tuning.target_modules=[q_proj,lm_head]"), True, VARLEN, TORCH.format("cuda")),
        ((*H100, PACKED, "model.attention=sdpa"), False, "sdpa, one dense mask over the packed row (CUDA, 16 bits)", TORCH.format("cuda")),
        ((*H100, PACKED, "model.attention=flash_attention_2"), False, "flash_attention_2 (CUDA, 16 bits)", TORCH.format("cuda")),
        ((PACKED, HALF), True, f"{VARLEN} or {BLOCKS}", f"{LIGER.format('cuda')} or {TORCH.format('cpu')}"),
        (("hardware@cluster.hardware=cpu", PACKED, HALF), True, BLOCKS, TORCH.format("cpu")),
    ],
)  # fmt: skip
def test_the_plan_names_the_kernels(words: tuple[str, ...], has_liger: bool, attention: str, head: str) -> None:
    assert planned(LORA, *words, has_liger=has_liger) == {"sft": (attention, head)}


def test_every_training_stage_names_its_own() -> None:
    found = planned("+experiment=llama_rlhf", "cluster.device=cuda", has_liger=True)
    assert {name: head for name, (_, head) in found.items()} == {
        "sft": LIGER.format("cuda"),
        "reward": kernels.NO_HEAD,
        "grpo": TORCH.format("cuda"),
        "evaluate": None,
        "merge": None,
    }
    assert [name for name, (attention, _) in found.items() if attention is None] == ["evaluate", "merge"]
    heads = planned("+experiment=llama_dpo", "cluster.device=cuda", has_liger=True)
    assert heads["dpo"][1] == TORCH.format("cuda")


def test_heads_that_the_variable_length_kernel_does_not_take_go_document_by_document() -> None:
    assert planned(LORA, *H100, PACKED, head_dim=288)["sft"][0] == ONE_BY_ONE.format("CUDA, 16")
    for head_dims, path in {(64, 64): "varlen", (256, 256): "varlen", (264, 264): "one by one"}.items():
        assert documents_path("cuda", is_half=True, head_dims=head_dims) == path
    assert documents_path("cuda", is_half=True, head_dims=(36, 36)) == "one by one"
    assert documents_path("cuda", is_half=True, head_dims=(192, 128)) == "one by one"
    assert documents_path("cuda", is_half=True, head_dims=(64, 64), has_dropout=True) == "one by one"


@pytest.mark.parametrize(
    ("release", "path"), [("2.11.0+cu130", "one by one"), ("2.12.0", "varlen"), ("3.0.1", "varlen")]
)
def test_a_torch_whose_kernel_lacks_what_is_called_goes_document_by_document(
    release: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.has_varlen.cache_clear()
    monkeypatch.setattr("importlib.metadata.Distribution.version", release)
    try:
        assert documents_path("cuda", is_half=True, head_dims=(64, 64)) == path
    finally:
        kernels.has_varlen.cache_clear()


def test_text_and_json_name_them(ask: Asker) -> None:
    words = ("plan", LORA, "cluster.device=cpu", PACKED, HALF)
    (stage,) = json.loads(ask(*words, "format=json").out)["stages"]
    assert (stage["attention"], stage["loss_head"]) == (BLOCKS, TORCH.format("cpu"))
    told = " ".join(ask(*words, "--all").out.split())
    assert "loss head chunked cross-entropy in plain torch (cpu)" in told and "attention documents: blocks" in told


def test_liger_by_name_is_refused_where_it_cannot_run(ask: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    needs_gpu = "model.loss_head: liger needs a GPU, and the ranks run on the CPU; type model.loss_head=auto"
    assert ask.refused("plan", LORA, "model.loss_head=liger", "cluster.device=cpu") == (needs_gpu,)
    assert liger_problem("liger", ("cpu",), has_liger=True) == needs_gpu
    missing = liger_problem("liger", ("cuda",), has_liger=False)
    assert missing is not None and "type pip install 'finetune-orchestrator[gpu]', or model.loss_head=auto" in missing
    assert liger_problem("liger", ("cuda", "cpu"), has_liger=True) is None
    assert liger_problem("auto", ("cpu",), has_liger=False) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert liger_problem("liger", ("cpu",), has_liger=True) is None
    assert (
        head_kernel("liger", "cpu", has_liger=True) == "liger" and head_kernel("auto", "cpu", has_liger=True) == "torch"
    )


def test_liger_by_name_for_a_pipeline_that_has_no_use_for_it_is_refused() -> None:
    cuda = ("model.loss_head=liger", "cluster.device=cuda")
    for words in (["+experiment=llama_reward"], [LORA, "tuning.target_modules=[q_proj,lm_head]"]):
        (sentence,) = head_problems(compose([*words, *cuda]), has_liger=True)
        assert sentence.startswith(
            "model.loss_head: liger computes the loss of SFT on a head without adapters, and no stage"
        )
        assert sentence.endswith("type model.loss_head=auto")
    assert head_problems(compose([LORA, *cuda]), has_liger=True) == []
    assert len(head_problems(compose([LORA, *cuda]), has_liger=False)) == 1
    assert head_problems(compose([LORA, *cuda, "launcher.python=/opt/python"]), has_liger=False) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model.checkpoint_every=2",), r"model\.checkpoint_every: 2, .* type model\.gradient_checkpointing=true"),
        (("model.compile=true", "sharding=zero3"), r"model\.compile: sharding=zero3 .* type model\.compile=false"),
        (("model.compile=true", "tuning=loreft"), r"model\.compile: tuning=loreft .* type model\.compile=false"),
        (("model.compile=true", "quantization=nf4"), r"model\.compile: quantization=nf4 .* type model\.compile=false"),
    ],
)
def test_settings_of_layers_that_cannot_be_obeyed_are_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["+experiment=llama_lora", *words])

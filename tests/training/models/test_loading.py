"""Two gloo ranks load a model in a stream: each holds its share and about two layers, with the values of transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import forking
import pytest
import rank_loading
import tiny_model
import torch
from rank_loading import Cell, adapted, config_of, contents
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from orchestrator.errors import ModelError
from orchestrator.models.loading import load_model
from orchestrator.models.tuning import cast_adapters_as_deepspeed
from orchestrator.models.weight_stream import layer_groups

LAYERS = 24
LAYER_MIB = 4.5
"""Two attention matrices of 256 x 256, two of 256 x 128, three of 256 x 1280, fp32."""
QUANTISED_MIB = 1.25
"""The largest weight of a layer. On a processor bitsandbytes makes four fp32 copies of a weight that it quantises."""
MARGIN_MIB = 8
"""Code that is read for the first time, gloo's buffers, the allocator."""


ADAPTED = {"dora": ("tuning.use_dora=true",), "loftq-nf4": ("tuning.init=loftq",)}
"""Adapters whose initial values depend on the whole values of the base."""


def _write(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_model.write_tokenizer(folder)
    return folder


def _large(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 1280, "num_hidden_layers": LAYERS} | changes
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=260, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    )


def _mixture() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            pad_token_id=0,
        )
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models; two ranks have loaded each of them in every way."""
    place = tmp_path_factory.mktemp("loading")
    torch.manual_seed(0)
    _write(place / "large", _large(), max_shard_size="30MB")
    _write(place / "mixture", _mixture())
    tiny_model.write_llama(place / "plain")
    tiny_model.write_llama(place / "tied", tied=True)
    tiny_model.write_rows(place / "rows.jsonl", 8)
    cells = [
        _cell(place, "mixture", "mixture"),
        _cell(place, "mixture-nf4", "mixture", nf4=True),
        _cell(place, "tied", "tied", kind="artifact"),
        _cell(place, "tied-nf4", "tied", nf4=True),
        _cell(place, "scorer", "plain", kind="scorer"),
        _cell(place, "classifier", "plain", kind="classifier"),
        _cell(place, "classifier-nf4", "plain", kind="classifier", nf4=True),
        _cell(place, "whole", "plain", device="cpu"),
        *(
            _cell(place, name, "plain", kind="policy", nf4="nf4" in name, words=words)
            for name, words in ADAPTED.items()
        ),
        # Last, so that no library is imported meanwhile.
        _cell(place, "large", "large"),
        _cell(place, "large-nf4", "large", nf4=True),
        _cell(place, "large-away", "large", sharding="none", device="meta"),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *launcher, rank_loading.__file__, json.dumps([asdict(cell) for cell in cells])]
    done = subprocess.run(argv, env=forking.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return place


def _cell(place: Path, name: str, folder: str, **changes: Any) -> Cell:
    return Cell(
        name=name, folder=str(place / folder), out=str(place / "out"), rows=str(place / "rows.jsonl"), **changes
    )


def _answers(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((place / "out" / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("large", LAYERS * LAYER_MIB / 2),
        # Half of the four bits, and all statistics: a byte per 64 weights.
        ("large-nf4", LAYERS * LAYER_MIB * (1 / 8 / 2 + 1 / 256) + 4 * QUANTISED_MIB),
        # To a device that is not this host: nothing stays here.
        ("large-away", 0),
    ],
)
def test_a_rank_holds_its_share_and_two_layers(place: Path, name: str, share: float) -> None:
    for answer in _answers(place, name):
        assert answer["growth"] <= share + 2 * LAYER_MIB + MARGIN_MIB


def _by_transformers(place: Path, folder: str, *, kind: Any = AutoModelForCausalLM, nf4: bool, **options: Any) -> Any:
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
            llm_int8_skip_modules=["score"] if kind is AutoModelForSequenceClassification else None,
        )
    torch.manual_seed(0)
    return kind.from_pretrained(place / folder, dtype=torch.float32, **options)


@pytest.mark.parametrize("name", ["large", "large-nf4", "mixture", "mixture-nf4", "tied", "tied-nf4"])
def test_the_values_are_those_of_transformers(place: Path, name: str) -> None:
    folder, _, quantised = name.partition("-")
    expected = contents(_by_transformers(place, folder, nf4=bool(quantised)))
    for answer in _answers(place, name):
        assert answer["contents"] == expected
        assert answer["shards"] == answer["of"]


@pytest.mark.parametrize(("name", "labels"), [("scorer", 1), ("classifier", 3), ("classifier-nf4", 3)])
def test_a_new_head_is_that_of_transformers(place: Path, name: str, labels: int) -> None:
    kind = AutoModelForSequenceClassification
    expected = contents(_by_transformers(place, "plain", kind=kind, nf4="nf4" in name, num_labels=labels))
    for answer in _answers(place, name):
        assert answer["contents"] == expected
        assert answer["shards"] == answer["of"]


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_starts_as_on_a_base_that_is_whole(place: Path, name: str) -> None:
    cell = _cell(place, name, "plain", nf4="nf4" in name, words=ADAPTED[name])
    config = config_of(cell, ranks=2)
    base = _by_transformers(place, "plain", nf4=cell.nf4)
    expected = contents(adapted(base, place / "plain", config))
    for answer in _answers(place, name):
        assert answer["contents"] == expected


def test_a_model_can_be_whole_on_every_rank_of_a_sharded_job(place: Path) -> None:
    expected = contents(_by_transformers(place, "plain", nf4=False))
    for answer in _answers(place, "whole"):
        assert answer["contents"] == expected and answer["shards"] == 0


def test_only_what_deepspeed_has_not_sharded_is_cast() -> None:
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2), "adapter": torch.nn.Linear(2, 2)})
    for parameter in model["base"].parameters():
        parameter.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed's mark
    cast_adapters_as_deepspeed(model, torch.bfloat16)
    assert model["base"].weight.dtype == torch.float32 and model["adapter"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("spoil", ["truncated", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, spoil: str) -> None:
    _write(tmp_path, _mixture(), max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    config = config_of(_cell(tmp_path, "damaged", ".", sharding="none"), ranks=1)
    if spoil == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ModelError, match=re.escape(shard.name)):
        load_model(tmp_path, config, weights_dtype=torch.float32)


def test_tensors_come_by_layer() -> None:
    names = ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "model.layers.10.mlp.up_proj.weight"]
    names += ["model.layers.2.mlp.experts.1.w1.weight", "model.layers.2.mlp.experts.0.w1.weight", "h.0.ln_1.bias"]
    groups = {tuple(sorted(group)) for group in layer_groups(names)}
    assert groups == {
        ("lm_head.weight",),
        ("model.embed_tokens.weight", "model.norm.weight"),
        ("model.layers.10.mlp.up_proj.weight",),
        ("model.layers.2.mlp.experts.0.w1.weight", "model.layers.2.mlp.experts.1.w1.weight"),
        ("h.0.ln_1.bias",),
    }

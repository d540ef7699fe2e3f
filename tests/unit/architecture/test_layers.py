"""Names of parameters: their depth, what tuning=freeze chooses, in which order it opens, at which rates."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from orchestrator.architecture.layers import (
    count_freeze_parameters,
    depth_of,
    describe_locations,
    levels_of,
    lowest_trained_layer,
    parameter_sizes,
    rates_of,
    trained_names,
)
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.composition.compose import CONF, compose
from orchestrator.config.model import Architecture
from orchestrator.config.rules import rule_problems
from orchestrator.config.tuning import FreezeTuning
from orchestrator.errors import ConfigError
from orchestrator.estimate.flops import flops_per_token
from orchestrator.estimate.model_states import state_memory, trainable_parameters

NAMES = [
    "model.embed_tokens.weight",
    *[f"model.layers.{n}.{part}.weight" for n in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")],
    "model.norm.weight",
    "lm_head.weight",
]  # fmt: skip
SMALL = Architecture(
    model_type="llama",
    vocab_size=260,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
    num_experts=0,
    num_experts_per_token=0,
    attention_bias=False,
    feed_forward_bias=False,
    num_positions=0,
    sliding_window=None,
)


def freeze(**changes: Any) -> FreezeTuning:
    nothing = {"layers": "none"}
    shipped = yaml.safe_load((CONF / "tuning" / "freeze.yaml").read_text())
    return FreezeTuning.model_validate({**shipped, **nothing, **changes})


def chosen(names: list[str] = NAMES, *, is_tied: bool = False, has_new_head: bool = False, **changes: Any) -> list[str]:
    trained = trained_names(names, freeze(**changes), is_tied=is_tied, has_new_head=has_new_head)
    return describe_locations([name for name in names if name in trained])


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"layers": "last 2"}, ["layer 10", "layer 11"]),
        ({"layers": "first 1"}, ["layer 0"]),
        ({"layers": (3, 11)}, ["layer 3", "layer 11"]),
        ({"layers": "all"}, [f"layer {n}" for n in range(12)]),
        ({"head": True}, ["head"]),
        ({"embeddings": True, "layers": "first 1"}, ["embeddings", "layer 0"]),
        ({"norms": True}, [*[f"layer {n}" for n in range(12)], "norm"]),
        ({"also": ("*.1?.mlp.*", "model.norm.*")}, ["layer 10", "layer 11", "norm"]),
    ],
)
def test_what_is_chosen(changes: dict[str, Any], places: list[str]) -> None:
    assert chosen(**changes) == places


def test_switches_choose_parts_of_layers() -> None:
    assert trained_names(NAMES, freeze(also=("*.1?.mlp.*",)), is_tied=False) == {
        "model.layers.10.mlp.up_proj.weight",
        "model.layers.11.mlp.up_proj.weight",
    }
    assert len(trained_names(NAMES, freeze(norms=True), is_tied=False)) == 13


def test_a_tied_head_is_the_embeddings() -> None:
    tied = [name for name in NAMES if name != "lm_head.weight"]
    assert chosen(tied, is_tied=True, head=True) == ["embeddings"] == chosen(tied, is_tied=True, embeddings=True)
    with pytest.raises(
        ConfigError, match=r"tuning.head: this model has none; the parameters of this model are model.embed"
    ):
        chosen(tied, head=True)


def test_a_new_head_is_always_trained() -> None:
    scorer = [*NAMES[:-1], "score.weight"]
    assert chosen(scorer, layers="last 1", has_new_head=True) == ["layer 11", "head"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "nothing is trained; choose layers, a switch or a pattern in tuning.also; the parameters of this model are",
        ),
        ({"also": ("*.qkv.*",)}, "tuning.also: *.qkv.* matches nothing; the parameters of this model are"),
        ({"layers": "last 13"}, "tuning.layers: last 13, but the model has 12 layers; type tuning.layers=all"),
        ({"layers": (11, 12)}, "tuning.layers: [12], but the 12 layers are numbered 0 to 11"),
    ],
)
def test_what_meets_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        chosen(**changes)
    assert str(refused.value).count("q_proj") <= 1, "layers are told once"


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", 3),
        ("base_model.model.score.modules_to_save.default.weight", 6),
        ("transformer.h.5.ln_1.weight", 5),
        ("transformer.wpe.weight", -1),
        ("transformer.ln_f.weight", 6),
        ("bert.encoder.layer.0.attention.self.query.weight", 0),
        ("bert.embeddings.LayerNorm.weight", -1),
        ("bert.pooler.dense.weight", 6),
        ("gpt_neox.embed_in.weight", -1),
        ("embed_out.weight", 6),
        ("model.layers.2.mlp.experts.7.w1.weight", 2),
    ],
)
def test_depths_by_many_names(name: str, depth: int) -> None:
    assert depth_of(name, 6) == depth


def test_levels_go_from_the_top_down() -> None:
    levels = levels_of(NAMES, 12)
    assert levels["lm_head.weight"] == levels["model.norm.weight"] == 0
    assert levels["model.layers.11.mlp.up_proj.weight"] == 1 and levels["model.layers.0.mlp.up_proj.weight"] == 12
    assert levels["model.embed_tokens.weight"] == 13
    assert set(levels_of(NAMES[1:4], 12).values()) == {0}, "the first level is never empty"


def test_rates_of_ulmfit() -> None:
    rates = rates_of(NAMES, 12, 1 / 2.6)
    assert rates["lm_head.weight"] == 1.0
    assert rates["model.layers.11.mlp.up_proj.weight"] == pytest.approx(1 / 2.6)
    assert rates["model.layers.10.mlp.up_proj.weight"] == pytest.approx(1 / 2.6**2)
    assert rates["model.embed_tokens.weight"] == pytest.approx(1 / 2.6**13)
    adapters = rates_of(["m.layers.0.q.lora_A", "m.layers.1.q.lora_A"], 2, 0.5)
    assert list(adapters.values()) == [0.5, 1.0], "what stands highest of the trained has the whole rate"
    assert set(rates_of(NAMES, 12, None).values()) == {1.0}
    with pytest.raises(
        ConfigError, match=r"layer_decay: no trained parameter belongs to a numbered layer: prompt.weight"
    ):
        rates_of(["prompt.weight"], 12, 0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "mixtral", "num_experts": 4, "num_experts_per_token": 2},
        {"model_type": "gpt2", "tie_word_embeddings": True, "num_positions": 64},
        {"model_type": "bert", "tie_word_embeddings": True, "num_positions": 64},
        {"model_type": "gemma2", "tie_word_embeddings": True},
    ],
)
def test_the_sizes_by_name_are_the_counted_parameters(changes: dict[str, Any]) -> None:
    model = SMALL.model_copy(update=changes)
    counts = count_parameters(model)
    assert sum(parameter_sizes(model).values()) == counts.total
    assert count_freeze_parameters(model, freeze(layers="last 2")) == 2 * counts.layer
    bert_head = 260 + (32 * 32 + 32) + 4 * 32 if model.model_type == "bert" else 0
    assert count_freeze_parameters(model, freeze(embeddings=True, head=True)) == counts.embedding + bert_head


def test_memory_and_time_know_what_is_frozen() -> None:
    words = [
        "+experiment=llama_full",
        "tuning=freeze",
        "tuning.layers=last 1",
        "model.dtype=bfloat16",
        "sharding=zero2",
    ]
    config = compose(words)
    counts = count_parameters(SMALL)
    assert trainable_parameters(SMALL, config) == counts.layer
    memory = state_memory(SMALL, config, config.stages["sft"])
    assert memory.weights == 2 * counts.total and memory.gradients == 2 * counts.layer
    full = compose(["+experiment=llama_full"])
    matrices = 3 * counts.layer + 32 + 260 * 32
    assert flops_per_token(SMALL, full, length=0) == 6 * matrices
    by_hand = 2 * matrices + 2 * ((matrices - 260 * 32) / 3 + 260 * 32) + 2 * counts.layer
    assert flops_per_token(SMALL, config, length=0) == pytest.approx(by_hand)
    assert lowest_trained_layer(SMALL, freeze(layers="last 1")) == 2


def test_what_contradicts_itself_is_refused() -> None:
    both = compose(["+experiment=llama_full", "tuning=freeze"])
    tuning = both.tuning.model_copy(update={"unfreeze_every_steps": 2, "unfreeze_every_epochs": 1.0})
    assert "say the same thing twice" in rule_problems(both.model_copy(update={"tuning": tuning}))[0]
    with pytest.raises(ConfigError, match="nf4 holds a frozen base and cannot be trained with tuning=freeze"):
        compose(["+experiment=llama_lora", "tuning=freeze", "quantization=nf4"])
    with pytest.raises(ConfigError, match=r"tuning\.layers"):
        compose(["+experiment=llama_full", "tuning=freeze", "tuning.layers=lasst 4"])
    stopping = "+stages.sft.early_stopping={metric: eval_loss, mode: min, patience: 1, min_delta: 0.0}"
    with pytest.raises(ConfigError, match=r"type stages.sft.evaluate_every_steps=50"):
        compose(["+experiment=llama_full", stopping.removeprefix("+")])

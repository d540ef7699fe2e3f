"""What an adapter cannot do is refused with the reason and with what to type; and the plan works for what it can. No torch."""

from __future__ import annotations

import functools

import pytest
import yaml

from orchestrator.architecture.adapter_parameters import count_adapter_parameters, shape_problems
from orchestrator.composition.compose import CONF, compose
from orchestrator.config.model import Architecture
from orchestrator.config.rules import rule_problems
from orchestrator.config.run import RunConfig
from orchestrator.config.tuning import ADAPTER_TUNINGS
from orchestrator.config.tuning_rules import LIMITS, ZERO
from orchestrator.errors import ConfigError
from orchestrator.estimate.flops import flops_per_token
from orchestrator.estimate.model_states import state_memory, trainable_parameters

REFUSED = {
    "adalora under ZeRO": (("tuning=adalora", "sharding=zero2"), "type sharding=none"),
    "adalora whose ranks do not fall": (("tuning=adalora", "tuning.rank=12"), "type tuning.initial_rank=18"),
    "adalora without steps": (("tuning=adalora", "tuning.first_share=0.8"), "0.8 + 0.3 is not below 1"),
    "packed prompt": (("tuning=prompt", "stages.sft.data.packing=best_fit"), "type stages.sft.data.packing=none"),
    "packed prefix": (("tuning=prefix", "stages.sft.data.packing=split"), "type stages.sft.data.packing=none"),
    "prefix, computed again": (
        ("tuning=prefix", "model.gradient_checkpointing=true"),
        "type model.gradient_checkpointing=false",
    ),
    "pissa on nf4": (("tuning=lora", "tuning.init=pissa", "quantization=nf4"), "type quantization=none"),
    "pissa in shards": (("tuning=lora", "tuning.init=pissa", "sharding=zero3"), "type sharding=zero2"),
    "pissa with dora": (("tuning=lora", "tuning.init=pissa", "tuning.use_dora=true"), "type tuning.use_dora=false"),
    "dora unpacked in shards": (
        ("tuning=lora", "tuning.use_dora=true", "quantization=nf4", "sharding=zero3"),
        "type sharding=zero2",
    ),
    "loftq without nf4": (("tuning=lora", "tuning.init=loftq"), "type quantization=nf4"),
    "ia3 without the module": (("tuning=ia3", "tuning.feedforward_modules=[up_proj]"), "up_proj must also be in"),
    "loreft nowhere": (
        ("tuning=loreft", "tuning.first_positions=0", "tuning.last_positions=0"),
        "type tuning.last_positions=7",
    ),
    "loreft in no layer": (("tuning=loreft", "tuning.layers=[]"), "type tuning.layers=all"),
    "exact oft in 16 bits": (
        ("tuning=oft", "tuning.use_cayley_neumann=false", "sharding=zero2", "model.dtype=bfloat16"),
        "type tuning.use_cayley_neumann=true",
    ),
}


@functools.cache
def _composed(*words: str, experiment: str = "llama_lora") -> RunConfig:
    return compose([f"+experiment={experiment}", *words])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_what_to_type(case: str) -> None:
    words, sentence = REFUSED[case]
    with pytest.raises(ConfigError) as told:
        compose(["+experiment=llama_lora", *words])
    assert any(sentence in problem for problem in told.value.problems), told.value.problems


@pytest.mark.parametrize("method", LIMITS)
def test_every_cell_of_the_table_is_taken_or_refused(method: str) -> None:
    """The table against the rules: shardings, nf4, kinds of stages."""
    limits = LIMITS[method]
    whole = _composed(experiment="llama_rlhf")
    config = _composed(f"tuning={method}")
    for sharding in ZERO:
        other = _composed(f"sharding={sharding}").sharding
        problems = rule_problems(config.model_copy(update={"sharding": other}))
        assert bool(problems) == (sharding in limits.shardings), problems
    assert rule_problems(config.model_copy(update={"quantization": _composed("quantization=nf4").quantization})) == []
    for name in whole.pipeline:
        kind = whole.stages[name].kind
        stages = {**config.stages, name: whole.stages[name]}
        pipeline = tuple(dict.fromkeys((*config.pipeline, name)))
        changed = config.model_copy(update={"stages": stages, "pipeline": pipeline})
        told = [one for one in rule_problems(changed) if one.startswith(f"stages.{name}:")]
        assert bool(told) == (kind not in limits.stages or (kind == "merge" and limits.merge is not None)), told


@pytest.mark.parametrize("method", LIMITS)
def test_memory_and_time_are_forecast(method: str) -> None:
    config = _composed(f"tuning={method}")
    model = _preset("llama3_8b")
    assert isinstance(config.tuning, ADAPTER_TUNINGS)
    trained = trainable_parameters(model, config)
    assert 0 < trained == count_adapter_parameters(model, config.tuning) < 100_000_000
    states = state_memory(model, config, config.stages["sft"])
    assert states.optimizer == trained * 8.0, "nothing of the base is in the optimizer"
    base = flops_per_token(model, _composed("tuning=ia3"), length=512)
    assert base <= flops_per_token(model, config, length=512) < 1.7 * base


def _preset(name: str) -> Architecture:
    return Architecture.model_validate(
        yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["preset"]["architecture"]
    )


def test_parameters_of_the_papers() -> None:
    """LoReFT's .031 % of LLaMA-7B is rank 8 at every layer with shared weights (2404.03592, table 1); VeRA's 1.4 M of Llama-2-7B."""
    llama = _preset("llama3_8b").model_copy(
        update={"vocab_size": 32000, "num_key_value_heads": 32, "intermediate_size": 11008}
    )
    reft = _composed("tuning=loreft").tuning
    assert isinstance(reft, ADAPTER_TUNINGS)
    assert count_adapter_parameters(llama, reft) == 32 * (2 * 8 * 4096 + 8) == pytest.approx(0.00031 * 6.74e9, rel=0.01)


def test_shapes_that_do_not_fit_are_told() -> None:
    model = _preset("smollm2_135m")
    uneven = _composed("tuning=oft", "tuning.block_size=28").tuning
    assert shape_problems(model, uneven)[0].endswith("type tuning.block_size=24")
    beyond = _composed("tuning=loreft", "tuning.layers=[0,30]").tuning
    assert shape_problems(model, beyond) == ["tuning.layers: [30], but the layers are numbered 0 to 29"]
    narrow = model.model_copy(update={"head_dim": 32})
    assert "type tuning=prompt" in shape_problems(narrow, _composed("tuning=prefix").tuning)[0]

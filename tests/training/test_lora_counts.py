"""The plan's parameter counts against the real models and real PEFT adapters, built on the meta device: no weights, no hub."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from orchestrator.architecture import count_lora_parameters, count_parameters
from orchestrator.compose import CONF, compose
from orchestrator.config.model import Architecture, LoraTuning
from orchestrator.errors import ConfigError
from orchestrator.training.tuning import apply_tuning

PRESETS = ("smollm2_135m", "llama3_8b", "qwen3_8b", "mixtral_8x7b", "llama3_70b")
TUNINGS = {
    "all linear layers": {},
    "two of them, DoRA": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "rank 3, rsLoRA": {"rank": 3, "use_rslora": True},
}


def preset(name: str) -> Architecture:
    return Architecture.model_validate(
        yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["preset"]["architecture"]
    )


def transformers_config(model: Architecture) -> PretrainedConfig:
    facts = model.model_dump(exclude={"model_type", "num_experts", "num_experts_per_token"})
    if model.num_experts:
        facts |= {"num_local_experts": model.num_experts, "num_experts_per_tok": model.num_experts_per_token}
    return AutoConfig.for_model(model.model_type, **facts)


def real_model(model: Architecture) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(transformers_config(model))


def count(module: torch.nn.Module, *, trained: bool) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


@pytest.mark.parametrize("name", PRESETS)
def test_the_base_has_as_many_parameters_as_the_plan_says(name: str) -> None:
    assert count(real_model(preset(name)), trained=False) == count_parameters(preset(name)).total


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", PRESETS[:4])
def test_the_adapter_has_as_many_parameters_as_the_plan_says(name: str, tuning: str) -> None:
    model = preset(name).model_copy(update={"num_hidden_layers": 3})
    settings = LoraTuning.model_validate(
        {**yaml.safe_load((CONF / "tuning" / "lora.yaml").read_text()), **TUNINGS[tuning]}
    )
    config = compose(["+experiment=llama_lora"]).model_copy(update={"tuning": settings})
    with torch.device("meta"):
        adapted = apply_tuning(real_model(model), config)
    assert count(adapted, trained=True) == count_lora_parameters(model, settings)


def test_a_target_module_that_meets_no_layer_is_refused() -> None:
    config = compose(["+experiment=llama_lora", "tuning.target_modules=[q_proj,query_proj]"])
    settings = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ConfigError, match="query_proj: no such layer; the linear layers of this model are down_proj"):
        apply_tuning(AutoModelForCausalLM.from_config(settings), config)

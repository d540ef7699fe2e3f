"""The plan's parameter counts against the real models and real PEFT adapters, built on the meta device: no weights, no hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from orchestrator.architecture.adapter_parameters import count_lora_parameters
from orchestrator.architecture.families import FAMILIES
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.architecture.read import read_architecture
from orchestrator.composition.compose import CONF, compose
from orchestrator.config.model import Architecture
from orchestrator.config.tuning import LoraTuning
from orchestrator.errors import ConfigError
from orchestrator.models.tracing.untrained_models import transformers_config
from orchestrator.models.tuning import apply_tuning

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


def real_model(model: Architecture) -> PreTrainedModel:
    kind = AutoModelForMaskedLM if model.model_type == "bert" else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(transformers_config(model))


def relative(family: str) -> Architecture:
    """A small model of a family, with what the family allows."""
    is_older = family in ("gpt2", "gpt_neox", "bert")
    is_mixture = family in ("mixtral", "qwen3_moe")
    return Architecture(
        model_type=family,
        vocab_size=1019,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6 if is_older else 3,
        head_dim=16,
        tie_word_embeddings=family in ("gpt2", "bert", "gemma", "gemma2", "gemma3_text"),
        num_experts=4 if is_mixture else 0,
        num_experts_per_token=2 if is_mixture else 0,
        attention_bias=family == "qwen3",
        feed_forward_bias=family == "llama",
        num_positions=64 if family in ("gpt2", "bert") else 0,
        sliding_window=None,
    )


def count(module: torch.nn.Module, *, trained: bool) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


@pytest.mark.parametrize("name", PRESETS)
def test_the_base_has_as_many_parameters_as_the_plan_says(name: str) -> None:
    assert count(real_model(preset(name)), trained=False) == count_parameters(preset(name)).total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_transformers_builds_it(family: str, tmp_path: Path) -> None:
    model = relative(family)
    real = real_model(model)
    assert count(real, trained=False) == count_parameters(model).total
    settings = LoraTuning.model_validate(yaml.safe_load((CONF / "tuning" / "lora.yaml").read_text()))
    with torch.device("meta"):
        task = None if family == "bert" else "CAUSAL_LM"
        adapted = get_peft_model(real, LoraConfig(r=settings.rank, target_modules="all-linear", task_type=task))
    assert count(adapted, trained=True) == count_lora_parameters(model, settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_of_every_family_are_read_from_its_config(family: str, tmp_path: Path) -> None:
    model = relative(family)
    transformers_config(model).save_pretrained(tmp_path)
    read = read_architecture(tmp_path)
    assert read is not None
    assert read.model_copy(update={"sliding_window": None}) == model.model_copy(update=_silent(family))


def _silent(family: str) -> dict[str, bool]:
    """What is true of a family whatever its config says, which the reader need not know."""
    return {"attention_bias": True} if family == "gpt_neox" else {}


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

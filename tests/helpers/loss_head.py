"""Small models with every kind of head, and the inputs of a loss."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from orchestrator.losses.token_logprobs import labelled_positions
from orchestrator.models.causal_lm import Query, attach_adapted_head, attach_head

VOCABULARY = 331


WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    match kind:
        case "tied":
            return LlamaForCausalLM(LlamaConfig(**WIDTHS, tie_word_embeddings=True))
        case "untied":
            return LlamaForCausalLM(LlamaConfig(**WIDTHS, tie_word_embeddings=False))
        case "softcap":
            return Gemma2ForCausalLM(Gemma2Config(**WIDTHS, final_logit_softcapping=3.0, attention_dropout=0.0))
        case "bias":
            model = PhiForCausalLM(PhiConfig(**WIDTHS, resid_pdrop=0.0))
            torch.nn.init.normal_(model.lm_head.bias)
            return model
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))
        case _:
            raise AssertionError(kind)


def tuned_model(model: Any, tuning: str) -> Any:
    attach_head(model)
    if tuning == "full":
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn"] if isinstance(model, GPT2LMHeadModel) else ["q_proj", "v_proj"]
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules=[*targets, "lm_head"] if tuning in ("lora-head", "dora-head") else targets,
            modules_to_save=["lm_head"] if tuning == "saved-head" else None,
            use_dora=tuning == "dora-head",
            init_lora_weights=False,
        ),
    )
    attach_adapted_head(model)
    return adapted


def make_inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and labels of about half of them: more than two chunks of `LEAST_ROWS`, and a remainder."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, VOCABULARY, (4, 41), generator=generator)
    labels_BT = ids_BT.where(torch.rand(4, 41, generator=generator) < 0.5, -100)
    assert bool((labels_BT[:, 0] != -100).any()), "a label at the first position must be left out"
    return ids_BT, labels_BT


def make_query(labels_BT: torch.Tensor, **more: Any) -> Query:
    return Query(labels_BT=labels_BT, positions_K=labelled_positions(labels_BT), **more)


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad and one.grad is not None
    }

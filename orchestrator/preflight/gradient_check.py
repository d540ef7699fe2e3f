"""One forward and backward of a two-layer copy of the model, to see before the spend that every trained parameter learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from orchestrator.dataloader.batch import Batch
from orchestrator.errors import ModelError, TrainingFailed

Tune = Callable[[PreTrainedModel], torch.nn.Module]
LAYERS, HIDDEN, VOCABULARY = 2, 128, 1024
SHOWN_NAMES = 8


def check_gradients(
    base_folder: Path, batch: Batch, tune: Tune, *, attention: str = "sdpa", outputs: int | None = None
) -> int:
    """Number of trained tensors of the copy that got a gradient. Raises TrainingFailed where one got none.

    The copy has the architecture, the names and the tuning of the real one, with two layers and narrow, random weights;
    with `outputs` it has a classifier's head of so many.
    """
    model = tune(small_copy(base_folder, attention=attention, outputs=outputs))
    model.train()
    names = missing_gradients(model, batch, classifies=outputs is not None)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingFailed("the tuning trains no parameter of this model: look at tuning.target_modules")
    if names:
        shown = ", ".join(names[:SHOWN_NAMES]) + (
            f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        )
        raise TrainingFailed(
            f"{len(names)} of {len(trained)} trained tensors get no gradient ({shown}): "
            "try model.gradient_checkpointing=false, or other tuning.target_modules"
        )
    return len(trained)


def missing_gradients(model: torch.nn.Module, batch: Batch, *, classifies: bool = False) -> list[str]:
    """Names of the trained parameters without a finite gradient after one backward pass over the batch."""
    inputs = batch.model_inputs()
    inputs["input_ids"] = inputs["input_ids"] % VOCABULARY
    if classifies:
        loss = (model(input_ids=inputs["input_ids"][:1]).logits.float() ** 2).sum()
    else:
        logits = model(**inputs).logits
        labels = (batch.labels_BT % VOCABULARY).where(batch.labels_BT >= 0, batch.labels_BT)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not loss.requires_grad:
        return [name for name, _ in trained]
    loss.backward()
    return [name for name, parameter in trained if parameter.grad is None or not bool(parameter.grad.isfinite().all())]


def small_copy(base_folder: Path, *, attention: str, outputs: int | None = None) -> PreTrainedModel:
    """A model of the same class with two narrow layers. Raises ModelError where its configuration cannot be read."""
    kind = AutoModelForCausalLM if outputs is None else AutoModelForSequenceClassification
    head = {} if outputs is None else {"num_labels": outputs}
    try:
        config = AutoConfig.from_pretrained(str(base_folder), local_files_only=True, **head)
    except (OSError, ValueError) as error:
        raise ModelError(f"{base_folder} holds no configuration that transformers knows: {error}") from error
    narrow = narrowed(config)
    try:
        model = kind.from_config(narrow, attn_implementation=attention, dtype=torch.float32)
        _try(model)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError):
        config.num_hidden_layers = LAYERS  # an architecture whose widths depend on each other in a way not known here
        model = kind.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model


def _try(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 4), dtype=torch.long))


def narrowed(config: Any) -> Any:
    """The configuration with two layers, small widths and a small vocabulary; heads keep their grouping."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    groups = heads // int(getattr(text, "num_key_value_heads", None) or heads)
    small: dict[str, int] = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 // groups),
        "head_dim": HIDDEN // 4,
        "vocab_size": VOCABULARY,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    for name, value in small.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:LAYERS]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return config

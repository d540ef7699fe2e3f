"""One forward and backward pass of a two-layer copy of the model, to check that every trained parameter learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from orchestrator.dataloader.batch import Batch
from orchestrator.errors import TrainingFailed
from orchestrator.models.small_copy import VOCABULARY, small_copy

Tune = Callable[[PreTrainedModel], torch.nn.Module]


SHOWN_NAMES = 8


def check_gradients(
    base_folder: Path, batch: Batch, tune: Tune, *, attention: str = "sdpa", outputs: int | None = None
) -> int:
    """Number of the copy's trained tensors that got a gradient. Raises TrainingFailed if one got none.

    The copy has the architecture, names and tuning of the real model, with two narrow layers of random weights;
    with `outputs` it has a classification head of that width.
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
    """Names of trained parameters without a finite gradient after one backward pass over the batch."""
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

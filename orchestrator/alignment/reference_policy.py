"""The reference policy of the KL: the base with its adapter off, a frozen copy of the adapter, or a second model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from orchestrator.config.alignment import PolicyStage
from orchestrator.config.tuning import ADAPTER_TUNINGS
from orchestrator.models.loading import DTYPES, load_model
from orchestrator.models.peft_adapters import adapter_settings
from orchestrator.models.tuning import build_policy, load_adapter
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.recipe import Session

REFERENCE = "reference"
"""Name of the frozen copy of the adapter."""


def build_policy_with_reference(
    context: StageContext, stage: PolicyStage, dtype: torch.dtype, packed: bool
) -> torch.nn.Module:
    """The module to train, with a frozen copy of the adapter that it starts from, if there is one."""
    model: Any = build_policy(context, dtype, packed)
    start, tuning = context.start, context.config.tuning
    if (
        start is None
        or not start.kind.is_adapter
        or not isinstance(tuning, ADAPTER_TUNINGS)
        or not stage.holds_reference
    ):
        return model
    model.add_adapter(REFERENCE, adapter_settings(tuning))
    load_adapter(model, start.folder, name=REFERENCE)
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.requires_grad_(False)
    model.set_adapter("default")
    return model


UseReference = Callable[[], AbstractContextManager[torch.nn.Module]]
"""A context manager that yields the module computing the reference policy."""


def reference_policy(session: Session, stage: PolicyStage) -> UseReference | None:
    """How to access the reference policy; None if the stage uses none."""
    if not stage.holds_reference:
        return None
    if not session.context.config.tuning.is_adapter:
        second = _second_model(session)
        return lambda: nullcontext(second)
    return lambda: _other_adapter(session)


@contextmanager
def _other_adapter(session: Session) -> Generator[torch.nn.Module]:
    """Switch the adapter layers directly: PEFT's own switches change which parameters are trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    module: Any = session.runtime.accelerator.unwrap_model(session.model)
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        has_copy = any(REFERENCE in getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name))
        if has_copy:
            layer._active_adapter = [REFERENCE]
        else:
            layer._disable_adapters = True
    try:
        yield session.model
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _second_model(session: Session) -> torch.nn.Module:
    """Full fine-tuning needs a second copy of the initial weights."""
    context, runtime = session.context, session.runtime
    folder = context.start.folder if context.start is not None else context.base_folder
    return runtime.hold(load_model(folder, context.config, weights_dtype=DTYPES[context.config.model.dtype]))

"""Freeing a model that scored, also of 4-bit parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit

from orchestrator.distributed.runtime import Runtime


def test_a_model_of_4_bits_is_freed_while_it_is_referred_to() -> None:
    model = torch.nn.Sequential(Linear4bit(64, 64, quant_type="nf4").to("cpu"), torch.nn.Linear(64, 8))
    model(torch.ones(1, 64))
    held: Any = SimpleNamespace(scoring=None, device=torch.device("cpu"))
    Runtime.release(cast("Runtime", held), model)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == 0

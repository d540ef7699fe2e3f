"""A process that is alone puts a model on its device, or over all GPUs where one is too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import make_bench
from transformers import AutoModelForCausalLM

from orchestrator.composition.compose import compose
from orchestrator.distributed.runtime import is_spread, start_single_runtime
from orchestrator.models.placement import place_by_size, place_for
from orchestrator.models.weight_stream import load_streamed, placed_on

GIB = 1 << 30
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("needed", "free", "place"),
    [(16, [24, 24], GPU), (20, [24, 24], "auto"), (20, [24], GPU), (20, [40, 8], GPU)],
)
def test_layers_are_spread_only_where_one_of_several_gpus_is_too_small(
    needed: int, free: list[int], place: torch.device | str
) -> None:
    assert place_by_size(needed * GIB, [one * GIB for one in free], GPU) == place


def test_a_model_is_whole_on_a_processor(tmp_path: Path) -> None:
    folder = make_bench(tmp_path).model
    config = compose(["+experiment=llama_lora", "model.dtype=float32", "cluster.device=cpu"])
    runtime = start_single_runtime(config, autocast=False)
    assert place_for(folder, config, torch.float32) == torch.device("cpu")
    ids_BT, logits = torch.arange(3, 9)[None], []
    for place in ("auto", torch.device("cpu")):
        with placed_on(place):
            model: Any = runtime.hold(load_streamed(AutoModelForCausalLM, folder, dtype=torch.float32)[0])
        assert not is_spread(model) and not model.training
        logits.append(model(ids_BT).logits)
    assert torch.equal(*logits)


def test_layers_that_are_spread_stay_where_they_are() -> None:
    """`meta` takes the part of a second GPU: to move its weights would be an error."""
    config = compose(["+experiment=llama_lora", "model.dtype=float32", "cluster.device=cpu"])
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    model.hf_device_map = {"0": "cpu", "1": "meta"}
    held: Any = start_single_runtime(config, autocast=False).hold(model)
    assert held[1].weight.is_meta and not held[0].weight.requires_grad

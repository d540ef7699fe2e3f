"""PiSSA and LoftQ decompose the base's weights where they are. The meta device stands in for a GPU: it mixes with no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch

from orchestrator.composition.compose import compose
from orchestrator.models import peft_adapters
from orchestrator.models.loading import load_model, silence_libraries
from orchestrator.models.peft_adapters import adapter_settings, apply_loftq_init
from orchestrator.models.weight_stream import placed_on

AWAY = torch.device("meta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silence_libraries()
    return tiny_model.write_llama(tmp_path_factory.mktemp("devices") / "model", hidden=64)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices of all matrices that are decomposed."""
    devices: list[torch.device] = []
    svd = torch.linalg.svd

    def recording(matrix: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        devices.append(matrix.device)
        return svd(matrix, *arguments, **options)

    monkeypatch.setattr(torch.linalg, "svd", recording)
    return devices


def _adapted(folder: Path, *words: str) -> Any:
    from peft import get_peft_model

    config = compose(["+experiment=llama_lora", f"model.base={folder}", "model.dtype=float32", *words])
    with placed_on(AWAY):
        base = load_model(folder, config, weights_dtype=torch.float32)
    tuning: Any = config.tuning
    return get_peft_model(base, adapter_settings(tuning))  # pyright: ignore[reportArgumentType]  # PEFT's types are narrower


def test_pissa_decomposes_on_the_device_of_the_base(folder: Path, decomposed: list[torch.device]) -> None:
    with pytest.raises(
        RuntimeError, match="incompatible tensor type"
    ):  # PEFT's next step, which a GPU's tensors can do
        _adapted(folder, "tuning.init=pissa")
    assert decomposed == [AWAY]


def test_loftq_decomposes_on_the_device_of_the_base(
    folder: Path, decomposed: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_device(layer: Any) -> torch.Tensor:
        return torch.empty(layer.out_features, layer.in_features, device=AWAY)

    monkeypatch.setattr(peft_adapters, "dequantised", on_the_device)  # bitsandbytes rounds nothing on this device
    model = _adapted(folder, "tuning.init=loftq", "quantization=nf4")
    apply_loftq_init(model, folder)
    assert set(decomposed) == {AWAY}

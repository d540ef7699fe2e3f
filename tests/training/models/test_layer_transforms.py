"""Layers that are compiled, or recomputed in part: the same numbers, by other ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.dataloader.batch import Batch, batch_of
from orchestrator.errors import ConfigError
from orchestrator.losses.token_logprobs import labelled_positions
from orchestrator.models import attention
from orchestrator.models.causal_lm import Query, attach_head
from orchestrator.models.layer_transforms import compile_layers, recompute_layers

LENGTHS = (11, 3, 18)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_llama(tmp_path_factory.mktemp("layerwise") / "model")


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    ALL_ATTENTION_FUNCTIONS.register(attention.DOCUMENTS, attention.documents_attention)


def _model(folder: Path) -> Any:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention.DOCUMENTS)
    attach_head(model)
    return model.train()


def _batch(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    documents = [(random.integers(3, 90, length), np.arange(length) >= 2) for length in LENGTHS]
    return batch_of(documents, range(len(documents)))


def _loss_and_gradients(model: Any, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    batch = _batch(seed)
    query = Query(labels_BT=batch.labels_BT, positions_K=labelled_positions(batch.labels_BT), is_summed=True)
    model.zero_grad()
    loss = -model(**batch.model_inputs(), query=query)[0].sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def _assert_same(one: Any, other: Any) -> None:
    for seed in (0, 1):
        (loss, gradients), (wanted, plain) = _loss_and_gradients(one, seed), _loss_and_gradients(other, seed)
        assert loss == pytest.approx(wanted, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, plain[name], rtol=1e-4, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
            )


def test_compiled_layers_compute_what_the_others_do(folder: Path, tmp_path: Path) -> None:
    compiled = _model(folder)
    assert compile_layers(compiled) == 2
    _assert_same(compiled, _model(folder))
    kernels = list((tmp_path / "inductor").rglob("*.so"))
    assert kernels, "nothing was compiled"


def test_one_layer_in_so_many_is_recomputed(folder: Path) -> None:
    model, plain = _model(folder), _model(folder)
    recompute_layers(model, every=2)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    calls = [0, 0]
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    _assert_same(model, plain)
    assert calls == [4, 2], "twice a step, and once"


def test_an_architecture_without_such_layers_is_refused() -> None:
    class Unknown(torch.nn.Module):
        def gradient_checkpointing_enable(self, _: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigError, match=r"type model\.checkpoint_every=1"):
        recompute_layers(Unknown(), every=3)
    with pytest.raises(ConfigError, match=r"type model\.compile=false"):
        compile_layers(Unknown())

"""What a GPU would have to wait for: boundaries of documents are looked at once a batch, and never by the variable-length kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.models import attention

WAITING = ("_local_scalar_dense", "nonzero", "_to_copy", "is_nonzero", "equal")
LAYERS = 3


class _Operators(TorchDispatchMode):
    """Records the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        return sum(self.names.count(name) for name in names)


@pytest.mark.parametrize("longest", [5, None])
def test_the_variable_length_kernel_is_called_as_torch_has_it_and_waits_for_nothing(longest: int | None) -> None:
    """Signature, shapes and gradients of torch's own operator, without numbers: it has no CPU kernel."""
    with FakeTensorMode():
        query = torch.randn(2, 4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.randn(2, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        boundaries = torch.zeros(4, dtype=torch.int32)
        with _Operators() as seen:
            out = attention._varlen(query, key, value, boundaries, longest, 0.25)
            out.float().sum().backward()
    assert out.shape == (2, 8, 4, 16)
    assert key.grad is not None and key.grad.shape == key.shape
    assert seen.count("_varlen_attn") == seen.count("_varlen_attn_backward") == 1
    before = seen.names[: seen.names.index("_varlen_attn")]
    assert not [name for name in before if name in WAITING]


def _model(dtype: torch.dtype) -> Any:
    attention.register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=LAYERS, attn_implementation="documents")
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gives", ["boundaries", "positions"])
def test_boundaries_are_looked_at_once_a_batch(dtype: torch.dtype, gives: str) -> None:
    model = _model(dtype)
    ids_BT = torch.arange(1, 11)[None]
    positions_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    boundaries = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
    more = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 4, "max_length_k": 4}
    inputs = {"position_ids": positions_BT} | (more if gives == "boundaries" else {})
    looked = attention._edges.cache_info().misses
    with _Operators() as seen, torch.no_grad():
        together = model(input_ids=ids_BT, use_cache=False, **inputs).logits[0]
        alone = model(input_ids=ids_BT[:, 4:7], use_cache=False).logits[0]
    assert attention._edges.cache_info().misses - looked == 2, "one for each of the two forward passes"
    assert seen.count("nonzero") == (1 if gives == "boundaries" else 2), (
        "positions are looked through once a forward pass"
    )
    assert torch.allclose(together[4:7], alone, atol=1e-5 if dtype == torch.float32 else 0.05)

"""Live bytes of a real module's forward and backward pass, traced without computing anything; must not know runs.

Under FakeTensorMode tensors have shapes and storages but no data, so an 8 B model can be traced on a laptop. Counted is
what a device's allocator would hold in addition to the parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Precision = Literal["autocast", "bfloat16", "adapters32", "float32"]
"""fp32 trained weights under bf16 autocast (no DeepSpeed); all bf16 (DeepSpeed); a bf16 base with fp32 adapters and no
autocast (ZeRO-3, which leaves PEFT's adapters as they are); all in fp32."""

FP32_UNDER_CUDA_AUTOCAST = (
    torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.layer_norm,
    functional.layer_norm, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.sum, torch.Tensor.sum,
)  # fmt: skip
"""Those of torch's CUDA autocast fp32 operations that decoders use; CPU autocast leaves them alone."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One allocation, or the end of one (negative bytes)."""

    bytes: int
    shape: tuple[int, ...]
    operation: str


class LiveBytes(TorchDispatchMode):
    """Tracks every storage created inside this block until nothing refers to it. Owns the list of events."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.events: list[Event] = []
        self._watched: dict[int, Any] = {}
        for tensor in known:
            self._watched[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor, str(func))
        return out

    def _watch(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched or tensor.device.type == "meta":
            return
        shape = tuple(tensor.shape)

        def ended(_: object) -> None:
            self.live -= size
            self._watched.pop(key, None)
            self.events.append(Event(bytes=-size, shape=shape, operation=operation))

        self._watched[key] = weakref.ref(storage, ended)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.events.append(Event(bytes=size, shape=shape, operation=operation))


class CudaAutocast(TorchFunctionMode):
    """Make CPU autocast keep fp32 where CUDA autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FP32_UNDER_CUDA_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(
                value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
                for value in args
            )
        return func(*args, **(kwargs or {}))


class _Consume(torch.autograd.Function):
    """Stand-in for the loss: keeps nothing of the logits, and makes their gradient when backward begins."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.like = (logits.shape, logits.dtype, logits.device)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Memory held by a forward and a backward pass in addition to the parameters and their gradients."""

    events: tuple[Event, ...]
    logits: int
    """Events before this one belong to the forward pass; here the logits exist and everything for backward is held."""
    kept: int
    """Bytes at that point, logits included."""
    peak: int
    evaluation: tuple[Event, ...]
    """Events of a forward pass without gradients."""
    evaluation_peak: int


Loss = Callable[[torch.Tensor], torch.Tensor]
"""Logits to a scalar."""


def trace(
    build: Callable[[], torch.nn.Module], *, rows: int, length: int, precision: Precision, loss: Loss = _Consume.apply
) -> Trace:
    """Trace the module returned by `build` (on the meta device), on `rows` x `length` tokens.

    A gradient is freed as soon as it has been accumulated into that of previous micro-batches.
    """
    with torch.device("meta"):
        module = build().train()
    with FakeTensorMode(), CudaAutocast():
        _materialise(module)
        ids_BT = torch.zeros(rows, length, dtype=torch.int64)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget)
        training = LiveBytes([*module.parameters(), *module.buffers(), ids_BT])
        with training:
            logits_BTV = _logits(module, ids_BT, precision)
            position, kept = len(training.events), training.live
            value = loss(logits_BTV)
            del logits_BTV
            value.backward()
        scoring = LiveBytes([*module.parameters(), *module.buffers(), ids_BT])
        with scoring, torch.no_grad():
            _logits(module.eval(), ids_BT, precision)
    return Trace(
        events=tuple(training.events),
        logits=position,
        kept=kept,
        peak=training.peak,
        evaluation=tuple(scoring.events),
        evaluation_peak=scoring.peak,
    )


def _materialise(module: torch.nn.Module) -> None:
    """Replace meta tensors by fake ones; tied ones stay tied."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and id(old) not in made:
                made[id(old)] = torch.nn.Parameter(_empty(old), requires_grad=old.requires_grad)
            part._parameters[name] = None if old is None else made[id(old)]
        for name, buffer in part._buffers.items():
            if buffer is not None and id(buffer) not in made:
                made[id(buffer)] = _empty(buffer)
            part._buffers[name] = None if buffer is None else made[id(buffer)]


def _empty(old: torch.Tensor) -> torch.Tensor:
    return torch.empty(old.shape, dtype=old.dtype, device="cpu")


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _logits(module: Any, ids_BT: torch.Tensor, precision: Precision) -> torch.Tensor:
    inputs = {"input_ids": ids_BT, "use_cache": False} if module.config.model_type != "bert" else {"input_ids": ids_BT}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        return module(**inputs).logits

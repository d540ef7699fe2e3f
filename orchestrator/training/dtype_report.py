"""Compares the frozen `model.dtype` with what the device computes, and reports a mismatch before the first step."""

from __future__ import annotations

import time
from statistics import median

import torch

from orchestrator.files.atomic import read_json
from orchestrator.machine.accelerators import Gpu
from orchestrator.machine.dtype import emulated_words, factor_words, frozen_reason, moved_sentence
from orchestrator.machine.processor import this_processor
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext

PRODUCT = (288, 1536, 576)
"""Rows, inputs and outputs of the timed product, those of a small model's feed-forward layer regardless of the model
trained: in small products call overhead dominates, and both types look the same."""
SECONDS = 0.4
"""Time limit per type, apart from one mandatory call; emulated types differ a hundredfold between processors."""


def report_number_type(context: StageContext, record: Recorder, device: torch.device) -> None:
    """Log the type and its reason; warn if the type chosen for this device would be different."""
    name = context.config.model.dtype
    is_native, why = native_bfloat16(device)
    reason = frozen_reason(read_json(context.run_file))
    record.event("dtype", dtype=name, why=reason or "as configured")
    record.log(f"number type: {name} ({'as configured' if reason is None else f'auto: {reason}'})")
    warning = _warning(name, reason, is_native=is_native, why=why)
    if warning is None:
        return
    factor = factor_words(_factor(device)) if _is_slow(name, is_native) else ""
    record.event("warning", message=f"{warning}{factor}")
    record.log(f"warning: {warning}{factor}")


def native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Whether the device multiplies bfloat16 without emulation, and the reason."""
    if device.type == "cuda":
        gpu = Gpu(name=torch.cuda.get_device_name(device), capability=torch.cuda.get_device_capability(device))
        # AMD numbers its architectures differently; torch knows which of them support it
        if torch.version.hip is not None:
            return torch.cuda.is_bf16_supported(including_emulation=False), f"{gpu.name}, as torch reports it"
        return gpu.has_native_bfloat16, gpu.bfloat16_reason()
    processor = this_processor()
    # a torch built without oneDNN computes bfloat16 in plain loops, whatever the processor supports
    if processor.has_native_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, f"{processor.name} has bfloat16 instructions, but oneDNN in this torch does not use them"
    return processor.has_native_bfloat16, processor.bfloat16_reason()


def _warning(name: str, reason: str | None, *, is_native: bool, why: str) -> str | None:
    best = "bfloat16" if is_native else "float32"
    if name == best:
        return None
    if reason is not None:
        return moved_sentence(name, reason, best, why)
    return emulated_words(why) if _is_slow(name, is_native) else None


def _is_slow(name: str, is_native: bool) -> bool:
    return name == "bfloat16" and not is_native


def _factor(device: torch.device) -> float:
    """Time of a product in bfloat16 over that in float32, forward and backward; about a second in total."""
    return _product_seconds(device, torch.bfloat16) / _product_seconds(device, torch.float32)


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Median over SECONDS without the first call, which compiles its kernel, unless that call used up the time."""
    rows, inputs, outputs = PRODUCT
    hidden_RI = torch.ones(rows, inputs, device=device, dtype=dtype, requires_grad=True)
    weight_OI = torch.ones(outputs, inputs, device=device, dtype=dtype)
    # on a CPU, process time: other work on the machine then counts for neither type
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: list[float] = []
    until = time.perf_counter() + SECONDS
    while not seconds or (time.perf_counter() < until and len(seconds) < 20):
        began = clock()
        torch.nn.functional.linear(hidden_RI, weight_OI).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - began)
    return median(seconds[1:] or seconds)

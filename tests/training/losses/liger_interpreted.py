"""Liger's kernel of the loss head beside torch's own, on a CPU through Triton's interpreter; run by test_liger.py, prints JSON.

The interpreter lacks two things that a soft cap needs: floats as arguments of a kernel (they stay Python floats, and
Liger asks for `softcap.to(float32)`), and the device's tanh ("extern_elementwise not supported in interpreter mode"). Both are
put into the interpreter here; the kernel's own lines stay as they are.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import liger_kernel.ops.cross_entropy as liger_cross_entropy
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from loss_head import VOCABULARY, gradients_of, make_inputs, make_model, make_query, tuned_model

from orchestrator.models.causal_lm import attach_head

CASES = [
    ("untied", "full"),
    ("untied", "lora"),
    ("tied", "full"),
    ("bias", "full"),
    ("bias", "lora"),
    ("softcap", "full"),
    ("softcap", "lora"),
    ("untied", "head alone"),
    ("untied", "lora-head"),
]


def complete_the_interpreter() -> None:
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    liger_cross_entropy.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def prepared(kind: str, tuning: str, choice: str) -> Any:
    model = make_model(kind)
    attach_head(model, choice=choice)
    if tuning == "head alone":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        return model
    torch.manual_seed(1)
    return tuned_model(model, tuning)


def score(model: Any, places: int, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and gradients of a multiple of their sum; the last `places` labels are taken away."""
    ids_BT, labels_BT = make_inputs()
    labels_BT[:, ids_BT.shape[1] - places :] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs_BT, _ = model(input_ids=ids_BT, query=make_query(labels_BT, is_summed=True))
    return logprobs_BT, gradients_of(model, -0.3 * logprobs_BT.sum())


def distance(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == exact.keys() and ours, (ours.keys(), exact.keys())
    return max(float((one - exact[name]).norm() / exact[name].norm().clamp_min(1e-30)) for name, one in ours.items())


def compare(kind: str, tuning: str, *, autocast: bool = False) -> dict[str, Any]:
    """Liger beside torch, both against torch in fp32: how far in loss and gradients, and where Liger put the sum."""
    exact_BT, exact = score(prepared(kind, tuning, "torch"), 0, False)
    torch_BT, plain = score(prepared(kind, tuning, "torch"), 0, autocast)
    model = prepared(kind, tuning, "liger")
    liger_BT, ours = score(model, 0, autocast)
    with torch.no_grad():
        judged_BT, _ = model(input_ids=make_inputs()[0], query=make_query(make_inputs()[1], is_summed=True))
    total = float(exact_BT.detach().sum().abs())
    return {
        "case": f"{kind} {tuning}{' bfloat16' if autocast else ''}",
        "nonzero": int((liger_BT != 0).sum()),
        "tokens": int((exact_BT != 0).sum()),
        "loss": float((liger_BT.sum() - exact_BT.sum()).abs()) / total,
        "torch_loss": float((torch_BT.sum() - exact_BT.sum()).abs()) / total,
        "without_gradients": float((judged_BT.sum() - liger_BT.sum()).abs()) / total,
        "gradients": distance(ours, exact),
        "torch_gradients": distance(plain, exact),
        "names": sorted(ours),
    }


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1", "Triton reads it when it is imported"
    complete_the_interpreter()
    found = [compare(kind, tuning) for kind, tuning in CASES]
    found += [compare("untied", tuning, autocast=True) for tuning in ("full", "lora")]
    empty_BT, gradients = score(prepared("untied", "full", "liger"), 41, False)
    told = {
        "cases": found,
        "vocabulary": VOCABULARY,
        "empty": bool(empty_BT.any()) or any(bool(one.any()) for one in gradients.values()),
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()

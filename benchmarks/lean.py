"""What the loss head and the types of LoRA's inputs give a training step, in one process, forward and backward.

    python benchmarks/lean.py MODEL_FOLDER [ROWS] [LENGTH] [TIMES]      4 57 12: about three minutes on one core

LoRA r=16 on all linear layers of a bf16 base, ROWS equal rows of random tokens, the second half of each trained, variants
interleaved; medians of processor seconds, so that others' work counts less. `plain` is whole logits under autocast over fp32
adapters with PEFT's casts, as PEFT and the common trainers have it; the last variant has 16-bit adapters without masters and no
autocast: the bound of what types can give, which is not taken because fp32 masters are a rule here.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from orchestrator.losses.token_cross_entropy import token_cross_entropy_sum
from orchestrator.losses.token_logprobs import labelled_positions
from orchestrator.models.causal_lm import Query, attach_head

VARIANTS = {
    "plain": ("logits", True, True),
    "head": ("head", True, True),
    "head, inputs as they are (ours)": ("head", True, False),
    "head, 16-bit adapters, no autocast": ("head", False, True),
}


def main() -> None:
    rows, length, times = [*map(int, sys.argv[2:]), *[4, 57, 12][len(sys.argv) - 2 :]]
    model = adapted(sys.argv[1])
    ids_BT = torch.randint(5, 40_000, (rows, length), generator=torch.Generator().manual_seed(0))
    labels_BT = ids_BT.where(torch.arange(length)[None] > length // 2, -100)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(times + 1):
        for name, variant in VARIANTS.items():
            took = step(model, ids_BT, labels_BT, variant)
            if turn:  # the first warms up
                seconds[name].append(took)
    print(f"{rows} rows of {length} tokens, {torch.get_num_threads()} threads, {times} times")
    print("| step | processor seconds, median (fastest) | plain / this |")
    print("|---|---|---|")
    bound = statistics.median(seconds["plain"])
    for name, took in seconds.items():
        print(f"| {name} | {statistics.median(took):.2f} ({min(took):.2f}) | {bound / statistics.median(took):.2f} |")


def adapted(folder: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    attach_head(base)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))


def step(model: Any, ids_BT: torch.Tensor, labels_BT: torch.Tensor, variant: tuple[str, bool, bool]) -> float:
    way, autocast, casts = variant
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = casts
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad, parameter.data = None, parameter.data.to(torch.float32 if autocast else torch.bfloat16)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if way == "logits":
            loss = token_cross_entropy_sum(model(input_ids=ids_BT, use_cache=False).logits, labels_BT)
        else:
            query = Query(labels_BT=labels_BT, positions_K=labelled_positions(labels_BT))
            loss = -model(input_ids=ids_BT, use_cache=False, query=query)[0].sum()
    (loss / labels_BT.numel()).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()

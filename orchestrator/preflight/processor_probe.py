"""Times a model's own matrix products on this processor: `python -m orchestrator.preflight.processor_probe JSON` prints what a second computes.

A process of its own, so that the plan needs no torch. Products are random matrices of the model's shapes, forward and backward, with
what stands between them in a layer; wide ones are timed on a slice, slow ones on fewer tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

Clock = Callable[[], float]

ROWS = 4
TOKENS = (8, 256)
"""Tokens of a trial, and of the measurement where it is fast enough."""
PRODUCT_SECONDS = 0.04
"""Time of one product's measurement; seven shapes make a quarter of a second, with one thread and with all half of one."""
WIDEST_ELEMENTS = 4_000_000
"""Of a slice: 16 MB in fp32, more than the caches nearest to a core hold."""

SCALING = 0.8
"""Of perfect scaling over threads: an assumption, for a busy processor alone."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What to time: the shapes of a model, and which weights get gradients."""

    hidden: int
    inner: int
    layers: int
    queries: int
    """Width of all query heads together."""
    keys: int
    vocabulary: int
    head_dim: int
    experts: int
    """Feed-forward layers that a token meets in a layer."""
    method: Literal["full", "adapter"]
    rank: int
    """Of LoRA; 0 for adapters without matrices of their own."""
    dtype: Literal["float32", "bfloat16"]
    compares: bool
    """Whether float32 is timed too, for the factor by which an emulated type is slower."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Operations of a token, as the forecast counts them, and its seconds."""

    flops: float
    seconds: float


def main(argv: list[str]) -> None:
    print(json.dumps(measure(Setting(**json.loads(argv[0])))))


def measure(setting: Setting) -> dict[str, float | bool | None]:
    """Operations a second over all layers and the head, with the threads that the job will have.

    Where other work keeps the processor busy, threads wait for one another and their wall-clock says nothing: one thread's own
    processor time counts there, times the threads.
    """
    threads, was_busy = torch.get_num_threads(), os.getloadavg()[0] > len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    rate = _rate(setting, time.process_time)
    # one thread and its own time for both types: other work on the machine then counts for neither
    slowdown = _rate(replace(setting, dtype="float32"), time.process_time) / rate if setting.compares else None
    if threads > 1 and was_busy:
        rate *= threads * SCALING
    elif threads > 1:
        torch.set_num_threads(threads)
        rate = max(rate, _rate(setting, time.perf_counter))
    return {"flops_per_second": rate, "threads": threads, "was_busy": was_busy, "slowdown": slowdown}


def _rate(setting: Setting, clock: Clock) -> float:
    torch.manual_seed(0)
    products = {
        (setting.hidden, setting.queries): setting.layers,
        (setting.queries, setting.hidden): setting.layers,
    }
    for shape, count in (
        ((setting.hidden, setting.keys), 2 * setting.layers),
        ((setting.hidden, setting.inner), 2 * setting.experts * setting.layers),
        ((setting.inner, setting.hidden), setting.experts * setting.layers),
        ((setting.hidden, setting.vocabulary), 1),
    ):
        products[shape] = products.get(shape, 0) + count
    timed = [(_product(setting, inputs, outputs, clock), count) for (inputs, outputs), count in products.items()]
    timed.append((_between(setting, clock), setting.layers))
    flops = sum(one.flops * count for one, count in timed)
    seconds = sum(one.seconds * count for one, count in timed)
    return flops / seconds


def _product(setting: Setting, inputs: int, outputs: int, clock: Clock) -> Timed:
    """One linear layer, forward and backward, with LoRA's two small ones beside a frozen weight."""
    is_full, rank = setting.method == "full", setting.rank
    width = max(1, min(outputs, WIDEST_ELEMENTS // inputs))
    held = torch.float32 if is_full else getattr(torch, setting.dtype)
    weight_OI = torch.randn(width, inputs, dtype=held).requires_grad_(is_full)
    a_RI, b_OR = (torch.randn(shape, requires_grad=True) for shape in ((rank, inputs), (width, rank)))

    def step(tokens: int) -> Callable[[], None]:
        hidden_TI = torch.randn(tokens, inputs, dtype=getattr(torch, setting.dtype), requires_grad=True)
        gradient_TO = torch.randn(tokens, width)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16"):
                out_TO = F.linear(hidden_TI, weight_OI)
                if rank:
                    out_TO = out_TO + F.linear(F.linear(hidden_TI, a_RI), b_OR)
            out_TO.backward(gradient_TO.to(out_TO.dtype))

        return run

    adapter = 0 if is_full else 6 * rank * (inputs + width)
    flops = (6 if is_full else 4) * inputs * width + adapter
    share = outputs / width
    return Timed(flops=flops * share, seconds=_seconds_per_token(step, clock) * share)


def _between(setting: Setting, clock: Clock) -> Timed:
    """What a layer does besides its products: two norms, rotation, attention, gate, residuals."""
    dtype = getattr(torch, setting.dtype)
    heads, groups = setting.queries // setting.head_dim, setting.keys // setting.head_dim

    def step(tokens: int) -> Callable[[], None]:
        length = max(1, tokens // ROWS)
        shapes = [(heads, setting.head_dim), (groups, setting.head_dim), (groups, setting.head_dim)]
        qkv = [torch.randn(ROWS, count, length, width, dtype=dtype, requires_grad=True) for count, width in shapes]
        hidden = torch.randn(ROWS, length, setting.hidden, dtype=dtype, requires_grad=True)
        gate, up = (
            torch.randn(ROWS, length, setting.inner * setting.experts, dtype=dtype, requires_grad=True)
            for _ in range(2)
        )
        cosine = torch.randn(length, setting.head_dim, dtype=dtype)

        def run() -> None:
            q, k = (one * cosine + torch.roll(one, setting.head_dim // 2, -1) * cosine for one in qkv[:2])
            attended = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True, enable_gqa=heads != groups)
            normed = hidden
            for _ in range(2):
                normed = normed + normed * torch.rsqrt(normed.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(dtype)
            (attended.sum() + normed.sum() + (F.silu(gate) * up).sum()).backward()

        return run

    length = TOKENS[1] // ROWS
    return Timed(flops=3 * 2 * length * setting.queries, seconds=_seconds_per_token(step, clock))


def _seconds_per_token(step: Callable[[int], Callable[[], None]], clock: Clock) -> float:
    """The fastest repetition: what else runs on the machine only adds."""
    few, many = TOKENS
    trial = step(few)
    trial()  # the first call compiles its kernels
    trial_seconds = _timed(trial, clock)
    tokens = many if trial_seconds * many / few < 8 * PRODUCT_SECONDS else few
    run, best, until = step(tokens), float("inf"), time.perf_counter() + PRODUCT_SECONDS
    if tokens == few and trial_seconds > PRODUCT_SECONDS:
        return trial_seconds / few
    while best == float("inf") or time.perf_counter() < until:
        best = min(best, _timed(run, clock))
    return best / tokens


def _timed(run: Callable[[], None], clock: Clock) -> float:
    began = clock()
    run()
    return clock() - began


if __name__ == "__main__":
    main(sys.argv[1:])

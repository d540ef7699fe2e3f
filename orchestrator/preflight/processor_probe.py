"""Times a model's own matrix products on this processor: `python -m orchestrator.preflight.processor_probe JSON`.

Prints operations per second. A separate process, so that the plan needs no torch. Products are of random matrices
of the model's shapes, forward and backward, with the other operations of a layer; wide ones are timed on a slice,
slow ones on fewer tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

Clock = Callable[[], float]

ROWS = 4
TOKENS = (8, 256)
"""Tokens of a trial run, and of the measurement if it is fast enough."""
PRODUCT_SECONDS = 0.04
"""Time to measure one product; seven shapes take a quarter of a second; with one thread and then all, half a second."""
WIDEST_ELEMENTS = 4_000_000
"""Elements of a slice: 16 MB in fp32, more than the caches nearest to a core hold."""

SCALING = 0.8
"""Share of perfect scaling over threads: an assumption, used only for a busy processor."""
OTHERS = 0.25
"""Cores' worth of other work that leaves the measurement alone: daemons, interrupts."""


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
    """Feed-forward layers that a token passes in each layer."""
    method: Literal["full", "adapter"]
    rank: int
    """Rank of LoRA; 0 for adapters without matrices of their own."""
    dtype: Literal["float32", "bfloat16"]
    compares: bool
    """Whether float32 is timed too, for the factor by which an emulated type is slower."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Operations per token, as the forecast counts them, and seconds per token."""

    flops: float
    seconds: float


def main(argv: list[str]) -> None:
    print(json.dumps(measure(Setting(**json.loads(argv[0])))))


def measure(setting: Setting) -> dict[str, float | bool | None]:
    """Operations per second over all layers and the head, with the number of threads the job will have.

    If other work keeps the processor busy, threads wait for one another and wall-clock time is meaningless: then the
    processor time of one thread is used, multiplied by the number of threads.
    """
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    occupied = _occupied_seconds(cores)
    began, own = time.perf_counter(), time.process_time()
    rate = _rate(setting, time.process_time)
    # The load average would miss what began in the last seconds, and count what has just ended.
    others = (_occupied_seconds(cores) - occupied - (time.process_time() - own)) / (time.perf_counter() - began)
    was_busy = others + threads > len(cores) + OTHERS
    # one thread and process time for both types: other work on the machine then counts for neither
    slowdown = _rate(replace(setting, dtype="float32"), time.process_time) / rate if setting.compares else None
    if threads > 1 and was_busy:
        rate *= threads * SCALING
    elif threads > 1:
        torch.set_num_threads(threads)
        rate = max(rate, _rate(setting, time.perf_counter))
    return {"flops_per_second": rate, "threads": threads, "was_busy": was_busy, "slowdown": slowdown}


def _occupied_seconds(cores: Collection[int]) -> float:
    """Seconds since boot in which these cores computed for anyone, or were taken away from a virtual machine (steal); 0 where
    Linux does not say.
    """
    names = {f"cpu{core}" for core in cores}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
    except OSError:
        return 0.0
    ticks = sum(sum(map(int, line[1:9])) - int(line[4]) - int(line[5]) for line in lines if line[0] in names)
    return ticks / os.sysconf("SC_CLK_TCK")


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
    """One linear layer, forward and backward, with LoRA's two small ones next to a frozen weight."""
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
    """A layer's operations other than its products: two norms, rotation, attention, gate, residuals."""
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
    """Seconds of the fastest repetition: other load on the machine only adds time."""
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

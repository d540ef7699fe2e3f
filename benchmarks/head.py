"""The loss head at a 128k vocabulary: memory and time of scoring trained tokens, chunked against whole logits.

    python benchmarks/head.py [TOKENS] [SHARE]      about five minutes on one core; prints the table of docs/performance.md

TOKENS positions (default 1024) of hidden size 768, of which SHARE (default 1.0) are trained; forward and backward of the sum of
their losses. Each figure is made by a process of its own: the growth of its peak resident memory (of the allocator's peak on a
GPU) over what stood before, and the median of three interleaved times (of the processor on a CPU, so that others' work counts less). "frozen" is a head under LoRA, "trained" one under full
tuning. `plain` is what transformers does: logits of every position, then the fp32 losses of the trained ones.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from orchestrator.losses.chunked_head import Shape, Term, chunked_logprobs_K
from orchestrator.losses.token_cross_entropy import token_cross_entropy_sum

VOCABULARY, HIDDEN = 128_256, 768
TIMES = 3
CASES = (("frozen", "bfloat16"), ("trained", "bfloat16"), ("trained", "float32"))


def main() -> None:
    if len(sys.argv) == 6:
        measure(*sys.argv[1:])
        return
    tokens, share = [*sys.argv[1:], *["1024", "1.0"][len(sys.argv) - 1 :]]
    print(f"vocabulary {VOCABULARY:,}, hidden size {HIDDEN}, {tokens} tokens, {float(share):.0%} trained, {device()}")
    print("| head | type | plain GiB | chunked GiB | plain / chunked | plain s | chunked s | time plain / chunked |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, dtype in CASES:
        found: dict[str, list[dict[str, float]]] = {"plain": [], "chunked": []}
        for _ in range(TIMES):
            for way, runs in found.items():
                runs.append(_apart(way, kind, dtype, tokens, share))
        plain, chunked = (
            [statistics.median(run[key] for run in runs) for key in ("gib", "seconds")] for runs in found.values()
        )
        ratios = [one / other for one, other in zip(plain, chunked, strict=True)]
        print(
            f"| {kind} | {dtype} | {plain[0]:.2f} | {chunked[0]:.2f} | {ratios[0]:.1f} | {plain[1]:.2f} "
            f"| {chunked[1]:.2f} | {ratios[1]:.2f} |",
            flush=True,
        )


def _apart(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(way: str, kind: str, dtype: str, tokens: str, share: str) -> None:
    """One forward and backward pass in this process; prints GiB and seconds."""
    torch.manual_seed(0)
    place, real = device(), getattr(torch, dtype)
    weight_VW = torch.randn(VOCABULARY, HIDDEN, device=place, dtype=real).mul_(0.02).requires_grad_(kind == "trained")
    hidden_TW = torch.randn(int(tokens), HIDDEN, device=place, dtype=real).requires_grad_()
    labels_T = torch.randint(VOCABULARY, (int(tokens),), device=place)
    labels_T[torch.rand(int(tokens), device=place) >= float(share)] = -100
    score(way, hidden_TW[:8], weight_VW, labels_T[:8])  # libraries load
    weight_VW.grad = hidden_TW.grad = None
    clock = time.perf_counter if place.type == "cuda" else time.process_time
    before, start = peak_gib(place, anew=True), clock()
    score(way, hidden_TW, weight_VW, labels_T)
    if place.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    print(json.dumps({"gib": peak_gib(place) - before, "seconds": seconds}))


def score(way: str, hidden_TW: torch.Tensor, weight_VW: torch.Tensor, labels_T: torch.Tensor) -> None:
    if way == "plain":
        loss = token_cross_entropy_sum((hidden_TW @ weight_VW.t())[None], labels_T[None])
    else:
        positions_K = (labels_T[1:] != -100).nonzero().squeeze(1)
        terms = [Term(hidden_KW=hidden_TW[positions_K], weight_VW=weight_VW)]
        logprobs_K, _ = chunked_logprobs_K(terms, None, labels_T[1:][positions_K], Shape(is_summed=True))
        loss = -logprobs_K.sum()
    loss.backward()


def peak_gib(place: torch.device, *, anew: bool = False) -> float:
    """The peak so far; with `anew` what is held now, from which the next peak is counted."""
    if place.type == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if anew:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory begins again
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


if __name__ == "__main__":
    main()

"""Where the time of a step goes (`profile=true`): seconds per span, and a trace of a few steps; no cost when off.

The spans in metrics.jsonl: rollout (generating a step's rows), data (making and moving a batch), forward, backward,
communication (agreement between ranks), optimizer, logging, evaluation, saving. Gradient reductions and shard
gathers run inside forward and backward: the trace shows them separately. On a GPU every span boundary waits for the
device, so a profiled step is a little slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from orchestrator.files.atomic import write_json, write_text

SPANS = ("rollout", "data", "forward", "backward", "communication", "optimizer", "logging", "evaluation", "saving")
COLLECTIVES = ("gloo:", "nccl:", "c10d::", "ncclDevKernel")
WAIT_STEPS, WARM_UP_STEPS, TRACED_STEPS = 2, 1, 3
TOP_OPERATORS = 40


def span(profiler: Profiler | None, name: str) -> AbstractContextManager[Any]:
    """A part of a step; does nothing when profiling is off."""
    return nullcontext() if profiler is None else profiler.span(name)


def begin_step(profiler: Profiler | None) -> None:
    """Mark the start of an optimizer step."""
    if profiler is not None:
        profiler.begin_step()


class Profiler:
    """Owns torch's profiler of one attempt on one rank."""

    def __init__(self, folder: Path, *, device: torch.device, rank: int, attempt: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._device = device
        self._folder, self._label, self._is_main = folder, f"attempt-{attempt}.rank-{rank}", rank == 0
        self._seconds: dict[str, float] = dict.fromkeys(SPANS, 0.0)
        self._taken = dict.fromkeys(SPANS, 0.0)
        self._open: list[float] = []
        """For every open span, the seconds spent in nested spans."""
        self._steps = 0
        self._writing_seconds = 0.0
        self._began = time.perf_counter()
        traced = min(TRACED_STEPS, steps)
        warm_up = min(WARM_UP_STEPS, steps - traced)
        plan = schedule(wait=min(WAIT_STEPS, steps - traced - warm_up), warmup=warm_up, active=traced, repeat=1)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._torch = profile(activities=activities, schedule=plan, on_trace_ready=self._write_trace)
        self._torch.start()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record seconds and a mark in the trace; time in nested spans is not counted twice."""
        self._wait()
        start = time.perf_counter()
        self._open.append(0.0)
        try:
            with record_function(f"orchestrator.{name}"):
                yield
                self._wait()
        finally:
            inner, took = self._open.pop(), time.perf_counter() - start
            self._seconds[name] += took - inner
            if self._open:
                self._open[-1] += took

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function wrapped in a span."""

        def watched(*arguments: Any, **options: Any) -> Any:
            with self.span(name):
                return function(*arguments, **options)

        return watched

    def begin_step(self) -> None:
        """Mark the start of an optimizer step, which ends the previous one with all its spans. Time that the profiler
        then spends collecting and writing belongs to no step.
        """
        if self._steps:
            began = time.perf_counter()
            self._torch.step()
            self._writing_seconds += time.perf_counter() - began
        else:
            self._began = time.perf_counter()
        self._steps += 1

    def take(self, num_steps: int) -> dict[str, float]:
        """Mean seconds per step of every span since the last call, as columns of metrics.jsonl."""
        new = {name: self._seconds[name] - self._taken[name] for name in SPANS}
        self._taken = dict(self._seconds)
        return {f"profile_{name}_seconds": seconds / num_steps for name, seconds in new.items()}

    def close(self) -> Mapping[str, float]:
        """Write the breakdown; return seconds per step by span, and `other` for what no span covers."""
        whole = (time.perf_counter() - self._began - self._writing_seconds) / max(1, self._steps)
        self._torch.stop()
        steps = max(1, self._steps)
        by_span = {name: seconds / steps for name, seconds in self._seconds.items()}
        seconds_by_span = {**by_span, "other": whole - sum(by_span.values()), "step": whole}
        if self._is_main:
            write_json(
                self._folder / f"{self._label}.breakdown.json",
                {"steps": self._steps, "seconds_a_step": seconds_by_span},
            )
        return seconds_by_span

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write_trace(self, traced: profile) -> None:
        traced.export_chrome_trace(str(self._folder / f"{self._label}.trace.json.gz"))
        events = traced.key_averages()
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        collectives = [event for event in events if event.key.startswith(COLLECTIVES)]
        seconds = sum(max(event.cpu_time_total, event.device_time_total) for event in collectives) / 1e6
        table = events.table(sort_by=order, row_limit=TOP_OPERATORS)
        head = f"collectives in the traced steps, overlapped with computation or not: {seconds:.3f} s\n"
        write_text(self._folder / f"{self._label}.operators.txt", head + table + "\n")


def describe_shares(seconds_by_span: Mapping[str, float]) -> dict[str, float | str]:
    """Seconds per step, and every span's share of it, for the record."""
    whole = seconds_by_span["step"]
    return {"seconds": whole} | {
        name: f"{seconds / whole:.0%}" for name, seconds in seconds_by_span.items() if name != "step"
    }

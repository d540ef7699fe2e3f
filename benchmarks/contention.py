"""Step times of the demonstration next to busy processes, by how long OpenMP's threads spin before they sleep.

    python benchmarks/contention.py [--steps 5] [--busy 0,1,2] [--spins 300000,10000,1000] [--seconds 150]

A value may come several times, to see the noise. 300000 is libgomp's own value of GOMP_SPINCOUNT: a thread then spins for
milliseconds at every barrier and keeps the core from the one it waits for. Medians of `step_seconds` after the first step, all in
one run; a run is stopped after `--steps` steps, or `--seconds` of training if at least one step was measured by then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from orchestrator.metrics.jsonl import number_of, read_rows

WARM_UP = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--busy", default="0,1,2", help="numbers of processes that compute at the same time")
    parser.add_argument("--spins", default="300000,10000,1000", help="values of GOMP_SPINCOUNT")
    parser.add_argument("--seconds", type=float, default=150.0, help="longest training of one cell")
    options = parser.parse_args()
    spins = options.spins.split(",")
    print(f"| busy processes | {' | '.join(spins)} |\n|---|{'---|' * len(spins)}")
    with tempfile.TemporaryDirectory(prefix="contention-") as folder:
        for busy in map(int, options.busy.split(",")):
            with busy_processes(busy):
                runs = [Path(folder) / f"{busy}-{number}" for number in range(len(spins))]
                found = [step_seconds(run, spin, options) for run, spin in zip(runs, spins, strict=True)]
            print(f"| {busy} | {' | '.join(f'{seconds:.2f} s' for seconds in found)} |", flush=True)
    return 0


@contextmanager
def busy_processes(count: int) -> Generator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def step_seconds(run: Path, spin: str, options: argparse.Namespace) -> float:
    """Median of the measured steps of one run, which is killed as soon as it has enough of them."""
    overrides = [f"name={run.name}", f"output_dir={run.parent}", "tracking=none", "launcher=local"]
    overrides += ["stages.sft.data.eval.path=none", "stages.sft.checkpoint.rehearse=false"]
    training = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "+experiment=llama_lora", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GOMP_SPINCOUNT": spin},
        start_new_session=True,
    )
    began: float | None = None
    seconds: list[float] = []
    try:
        while training.poll() is None and len(seconds) < options.steps + WARM_UP:
            time.sleep(0.5)
            rows = read_rows(run / "sft" / "metrics.jsonl")
            seconds = [value for row in rows if (value := number_of(row, "step_seconds")) is not None]
            began = time.monotonic() if began is None and seconds else began
            if began is not None and time.monotonic() - began > options.seconds and len(seconds) > WARM_UP:
                break
    finally:
        stop(training)
    if len(seconds) <= WARM_UP:
        raise SystemExit(f"{run}: ended before a step was measured")
    return statistics.median(seconds[WARM_UP:])


def stop(training: subprocess.Popen[bytes]) -> None:
    """Kill a run with its rank, which is in a session of its own."""
    for process in psutil.Process(training.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    training.kill()
    training.wait()


if __name__ == "__main__":
    sys.exit(main())

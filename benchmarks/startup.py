"""How long the login side takes to answer: median times of fresh processes. Run: python benchmarks/startup.py [RUNS]."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LORA = "+experiment=llama_lora"
COMMANDS: dict[str, tuple[list[str], int, float]] = {
    "--help": (["--help"], 0, 1.0),
    "plan": (["plan", LORA], 0, 1.0),
    "render": (["render", LORA], 0, 1.0),
    "a broken configuration": (["plan", LORA, "stages.sft.optimzer.lr=1", "seed=x"], 2, 1.5),
}
"""Words, exit code, and the seconds that the design allows on an idle machine."""


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        seconds_of(["--help"], 0, Path(folder))  # the byte code is written
        print(f"{'command':<24} {'median':>8} {'fastest':>8} {'allowed':>8} {'of processor':>13}   of {runs} runs")
        for name, (words, code, allowed) in COMMANDS.items():
            taken, worked = zip(*(seconds_of(words, code, Path(folder)) for _ in range(runs)), strict=True)
            median = statistics.median(taken)
            slow += median > allowed
            print(f"{name:<24} {median:7.2f}s {min(taken):7.2f}s {allowed:7.1f}s {statistics.median(worked):12.2f}s")
    return 1 if slow else 0


def seconds_of(words: list[str], code: int, folder: Path) -> tuple[float, float]:
    """Seconds by the clock, and of the processor: the second is less disturbed by what else the machine does."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())

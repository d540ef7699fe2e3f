"""How long the login side takes to answer: the median wall time of fresh processes. Run: python benchmarks/startup.py [RUNS]"""

from __future__ import annotations

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
        print(f"{'command':<24} {'median':>8} {'fastest':>8} {'allowed':>8}   of {runs} runs")
        for name, (words, code, allowed) in COMMANDS.items():
            taken = [seconds_of(words, code, Path(folder)) for _ in range(runs)]
            median = statistics.median(taken)
            slow += median > allowed
            print(f"{name:<24} {median:7.2f}s {min(taken):7.2f}s {allowed:7.1f}s")
    return 1 if slow else 0


def seconds_of(words: list[str], code: int, folder: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())

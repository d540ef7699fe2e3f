"""Seconds from the command to the first training step, beside the same worker started by hand, in one interleaved run.

python benchmarks/first_step.py [ROUNDS]      medians over the rounds, a tiny model, launcher=local and launcher=torchrun
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import tiny_model  # noqa: E402

from orchestrator.metrics.jsonl import read_rows  # noqa: E402


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    taken: dict[str, list[float]] = {"worker alone": [], "launcher=local": [], "launcher=torchrun": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny_model.write_llama(folder / "model")
        tiny_model.write_rows(folder / "rows.jsonl", 32)
        for number in range(rounds + 1):  # the first round fills caches and is left out
            for name, seconds in taken.items():
                measured = _first_step(folder, name, f"{name.split('=')[-1].replace(' ', '-')}-{number}")
                if number:
                    seconds.append(measured)
    bare = statistics.median(taken["worker alone"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:<18} {median:6.2f} s to the first step ({min(seconds):.2f} fastest), {median - bare:+.2f} s")
    return 0


def _first_step(folder: Path, name: str, run: str) -> float:
    words = [
        "+experiment=llama_lora",
        f"name={run}",
        f"output_dir={folder / 'runs'}",
        f"model.base={folder / 'model'}",
        f"stages.sft.data.train.path={folder / 'rows.jsonl'}",
        "stages.sft.data.eval.path=none",
        "stages.sft.max_steps=1",
        "tracking=none",
        f"launcher={'torchrun' if 'torchrun' in name else 'local'}",
    ]
    environment = {**os.environ, "ORCHESTRATOR_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    run_file = folder / "runs" / run / "run.json"
    argv = [sys.executable, "-m", "orchestrator", "run", *words]
    if name == "worker alone":
        argv[3] = "render"
        subprocess.run(argv, env=environment, check=True, capture_output=True)
        argv = [sys.executable, "-m", "orchestrator.worker", str(run_file), "--stage", "sft"]
    start = time.time()
    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        metrics = run_file.parent / "sft" / "metrics.jsonl"
        while not any("loss" in row for row in read_rows(metrics)):
            assert process.poll() is None or metrics.exists(), "it ended before its first step"
            time.sleep(0.02)
        seconds = time.time() - start
        process.wait()
    return seconds


if __name__ == "__main__":
    sys.exit(main())

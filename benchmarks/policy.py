"""A policy that learns on a CPU: GRPO and RLOO climb a verifiable reward on a tiny random model, three seeds each.

    python benchmarks/policy.py [STEPS]      about 6 minutes on two cores; prints the table of docs/alignment.md

The reward is the share of a completion's characters that are `a`: a random model of 260 tokens begins near 1/260 of the maximum.
Every run is the whole command, with rollouts, reference policy, checkpoints and the proof at its end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from alignment_runs import words_of, write_sets
from bench import Bench, make_bench

from orchestrator.metrics.jsonl import last_attempt_rows, read_rows
from orchestrator.run_folder.folder import RunFolder

SEEDS = (0, 1, 2)
SETTINGS = (
    "tuning=full",
    "launcher=local",
    "stages.grpo.optimizer.lr=3e-3",
    "stages.grpo.kl_coefficient=0.001",
    "stages.grpo.rollout={prompts: 8, group_size: 8, max_new_tokens: 16, passes: 1, generate_size: 64}",
    "stages.grpo.limits={kl: null, entropy: null, length_growth: null}",
    "stages.grpo.batch.global_size=64",
    "stages.grpo.batch.micro_size=64",
    "stages.grpo.checkpoint.every_steps=null",
)


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    reached = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(Path(folder) / "bench")
        write_sets(bench.root)
        print("| advantage | seed | reward at step 1 | mean of the last ten | steps to .8 | seconds |")
        print("|---|---|---|---|---|---|")
        for advantage in ("grpo", "rloo"):
            for seed in SEEDS:
                rewards, seconds = climb(bench, advantage, seed, steps)
                first = next((number for number, reward in enumerate(rewards, 1) if reward >= 0.8), None)
                last = sum(rewards[-10:]) / 10
                reached += rewards[0] < 0.2 and last > 0.8
                print(f"| {advantage} | {seed} | {rewards[0]:.3f} | {last:.3f} | {first} | {seconds:.0f} |", flush=True)
    print(f"\n{reached} of 6 climbed from below .2 to above .8 of the maximum")
    return 0 if reached == 6 else 1


def climb(bench: Bench, advantage: str, seed: int, steps: int) -> tuple[list[float], float]:
    """The mean reward of every rollout of one run."""
    name = f"{advantage}-{seed}"
    more = (f"stages.grpo.advantage={advantage}", f"seed={seed}", f"stages.grpo.max_steps={steps}")
    argv = [sys.executable, "-m", "orchestrator", *words_of(bench, "grpo", name, *SETTINGS, *more)]
    begin = time.perf_counter()
    environment = {**bench.environment(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(argv, cwd=bench.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = last_attempt_rows(read_rows(RunFolder(bench.runs / name).stage("grpo").metrics))
    return [float(str(row["reward"])) for row in rows if "reward" in row], time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())

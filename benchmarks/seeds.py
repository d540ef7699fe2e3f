"""The luck of seeds, measured: 3 x 3 short runs of LoRA on SmolLM2-135M, and what stopping early would have kept.

Run: python benchmarks/seeds.py ROWS.jsonl FOLDER [STEPS [WORDS ...]]; 20 steps by default. The same command goes on where it was stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import number_of, read_rows, step_of
from orchestrator.run_folder.folder import RunFolder

NAME = "seeds"
EVERY = 5
HELD_OUT = 24


def main() -> int:
    rows, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    words = [
        "+experiment=llama_lora",
        "study=seeds",
        f"name={NAME}",
        f"output_dir={folder}",
        f"stages.sft.data.train.path={rows}",
        f"stages.sft.max_steps={steps}",
        f"stages.sft.evaluate_every_steps={EVERY}",
        f"stages.sft.data.eval.max_rows={HELD_OUT}",
        "tracking=none",
        "launcher=local",
        *sys.argv[4:],
    ]
    code = subprocess.run([sys.executable, "-m", "orchestrator", *words], check=False).returncode
    if code == 0:
        _tell_early(folder, steps)
    return code


def _tell_early(folder: Path, steps: int) -> None:
    """How well the ranking on the way foretells that of the end."""
    trials = [trial["name"] for trial in read_json(folder / f"{NAME}-study" / "report.json")["trials"]]
    curves = {name: _losses(RunFolder(folder / name)) for name in trials}
    final = sorted(trials, key=lambda name: curves[name][steps])
    for step in range(EVERY, steps, EVERY):
        order = sorted(trials, key=lambda name: curves[name][step])
        kept = order[: len(trials) // 3]
        place = order.index(final[0]) + 1
        print(
            f"step {step}: rank correlation with the end {_spearman(order, final):.2f}; the best of the end is number {place} "
            f"of {len(trials)}; keeping {len(kept)} would end at {min(curves[name][steps] for name in kept):.5f} instead of "
            f"{curves[final[0]][steps]:.5f}"
        )


def _losses(run: RunFolder) -> dict[int, float]:
    rows = [row for row in read_rows(run.stage("sft").metrics) if "eval_loss" in row]
    found = {step_of(row): number_of(row, "eval_loss") for row in rows}
    return {step: value for step, value in found.items() if value is not None}


def _spearman(one: list[str], other: list[str]) -> float:
    """Rank correlation of two orders without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    squares = sum((one.index(name) - other.index(name)) ** 2 for name in one)
    return 1 - 6 * squares / (len(one) * (len(one) ** 2 - 1))


if __name__ == "__main__":
    sys.exit(main())

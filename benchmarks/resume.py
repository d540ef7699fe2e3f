"""The whole grid of resumes: {full, LoRA, QLoRA} x {none, zero1, zero2, zero3, offload}, moved between 1, 2 and 4 gloo ranks and between shardings.

    python benchmarks/resume.py            about 8 minutes on two cores; prints the tables of docs/checkpoints.md

A tiny Llama in fp32, 8 steps of 8 rows; the run is cut at step 4 (or 6) and goes on elsewhere. A cell holds the largest relative
difference of loss (and gradient norm) over the steps after the cut, against the run that was never cut; 0 is bit-equal.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from rank_runs import Cell, Place, largest_difference, make_place, train

from orchestrator.files.atomic import read_json

METHODS = {"full": ("tuning=full",), "lora": ("tuning=lora",), "qlora": ("tuning=lora", "quantization=nf4")}
SHARDINGS = ("none", "zero1", "zero2", "zero3", "zero3_offload")
NAMES = [f"{method}-{sharding}" for method in METHODS for sharding in SHARDINGS]
LIMIT = 1e-6


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder))
        runs = [
            place.make(name, *METHODS[name.split("-")[0]], f"sharding={name.split('-')[1]}", ranks=2) for name in NAMES
        ]
        train(place, [Cell(run=str(run)) for run in runs], ranks=2)
        columns = {
            "2 -> 2": move(place, NAMES, "{}", 4, 2),
            "2 -> 1": move(place, NAMES, "{}", 4, 1),
            "2 -> 4": move(place, NAMES, "{}", 4, 4),
        }
        columns["1 -> 2"] = move(place, NAMES, "{}-4-1", 6, 2)
        columns["4 -> 2"] = move(place, NAMES, "{}-4-4", 6, 2)
        print(table(columns))
        equal = sum(same_weights(place, name) for name in NAMES)
        print(f"\n2 -> 2: final weights bit-equal in {equal} of {len(NAMES)}")
        worst_shift = shift_shardings(place)
        worst = max(value for column in columns.values() for value, _ in column.values())
        print(f"\nlargest difference of a loss: {max(worst, worst_shift):.1e}, {LIMIT:g} is allowed")
        return 0 if max(worst, worst_shift) < LIMIT and equal == len(NAMES) else 1


def move(place: Place, names: Sequence[str], source: str, step: int, ranks: int) -> dict[str, tuple[float, float]]:
    """Takes every run up at another number of ranks; differences of loss and gradient norm against the straight run."""
    micro_size = 1 if ranks == 4 else 2
    changes = {"cluster__processes_per_node": ranks, "stages__sft__batch__micro_size": micro_size}
    return _go_on(
        place, {name: (source.format(name), changes) for name in names}, step, ranks, suffix=f"-{step}-{ranks}"
    )


def _go_on(
    place: Place, runs: dict[str, tuple[str, dict[str, Any]]], step: int, ranks: int, *, suffix: str
) -> dict[str, tuple[float, float]]:
    taken = {name: f"{source}{suffix}" for name, (source, _) in runs.items()}
    folders = [place.branch(source, taken[name], step=step, **changes) for name, (source, changes) in runs.items()]
    train(place, [Cell(run=str(folder), attempt=2) for folder in folders], ranks=ranks)
    found: dict[str, tuple[float, float]] = {}
    for name, run in taken.items():
        straight, moved = place.rows(name), place.rows(run)
        assert sorted(moved) == list(range(step + 1, 9)), (run, sorted(moved))
        found[name] = (largest_difference(moved, straight, "loss"), largest_difference(moved, straight, "grad_norm"))
    return found


def shift_shardings(place: Place) -> float:
    """Saved under one sharding at two ranks, taken up under another one at one rank."""
    sections = {name: read_json(place.run(f"full-{name}") / "run.json")["config"]["sharding"] for name in SHARDINGS}
    print("\n| full, 2 -> 1, saved under | " + " | ".join(f"goes on under {name}" for name in SHARDINGS) + " |")
    print("|---" * (len(SHARDINGS) + 1) + "|")
    worst = 0.0
    results: dict[tuple[str, str], float] = {}
    for goal in SHARDINGS:
        changes = {"cluster__processes_per_node": 1, "sharding": sections[goal]}
        column = _go_on(
            place, {f"full-{name}": (f"full-{name}", changes) for name in SHARDINGS}, 4, 1, suffix=f"-to-{goal}"
        )
        for name in SHARDINGS:
            results[name, goal] = column[f"full-{name}"][0]
            worst = max(worst, results[name, goal])
    for name in SHARDINGS:
        print(f"| {name} | " + " | ".join(f"{results[name, goal]:.1e}" for goal in SHARDINGS) + " |")
    return worst


def same_weights(place: Place, name: str) -> bool:
    one = load_file(place.run(name) / "weights-1.safetensors")
    other = load_file(place.run(f"{name}-4-2") / "weights-2.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def table(columns: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = ["| loss (gradient norm) | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in NAMES:
        cells = [f"{column[name][0]:.1e} ({column[name][1]:.1e})" for column in columns.values()]
        lines.append(f"| {name.replace('-', ', ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("0.0e+00", "0")


if __name__ == "__main__":
    sys.exit(main())

"""Twenty-five SIGKILLs at random moments of a save at two gloo ranks, in one run: does it end bit-equal to a run that nobody touched?

    python benchmarks/kills.py [--kills 25] [--seed 0]        about 6 minutes on two cores

LoRA with dropout under ZeRO-2 on a tiny Llama, a checkpoint at every step. Every attempt is killed as a whole (torchrun and both
ranks) while a checkpoint is being written; the next one takes up what is proven. Prints what lay on the disk at each kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from rank_runs import Cell, Place, command, environment, make_place, train

from orchestrator.files.manifest import MANIFEST
from orchestrator.run_folder import checkpoints

STEPS = 90
WORDS = (
    "tuning=lora",
    "tuning.dropout=0.2",
    "sharding=zero2",
    f"stages.sft.max_steps={STEPS}",
    "stages.sft.checkpoint.every_steps=1",
    "stages.sft.checkpoint.keep_last=3",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder))
        train(place, [Cell(run=str(place.make("straight", *WORDS, ranks=2)))], ranks=2)
        run = str(place.make("killed", *WORDS, ranks=2))
        seen: Counter[str] = Counter()
        print("| kill | on the disk | newest proven after it |\n|---|---|---|")
        for number in range(1, options.kills + 1):
            state = kill_in_a_save(place, Cell(run=run, attempt=number), dice)
            found, refused = checkpoints.newest_valid(place.stage("killed"))
            assert found is not None and not refused, "a checkpoint with a name failed its proof"
            seen[state] += 1
            print(f"| {number} | {state} | step {found.step} |", flush=True)
        train(place, [Cell(run=run, attempt=options.kills + 1)], ranks=2)
        return report(place, options.kills, seen)


def kill_in_a_save(place: Place, cell: Cell, dice: random.Random) -> str:
    """Starts an attempt, waits for its second save or a later one, kills at a random moment of it; what lay on the disk."""
    folder = place.stage("killed").checkpoints
    before = max(checkpoints.saved_steps(place.stage("killed")), default=0)
    running = subprocess.Popen(
        command([cell], ranks=2),
        env=environment(place),
        cwd=place.root,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while max(checkpoints.saved_steps(place.stage("killed")), default=0) <= before or not list(
        folder.glob(".step-*.partial")
    ):
        assert running.poll() is None, "it ended before it could be killed"
    time.sleep(dice.choice((0, 0.002, 0.005, 0.01, 0.02)) * dice.random())
    ranks = ranks_of(cell.run)
    for process in (running.pid, *ranks):
        os.kill(process, signal.SIGKILL)
    running.wait()
    return state_of(folder)


def ranks_of(run: str) -> list[int]:
    """Processes that have the run's folder in their command line."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = run.encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid()
        except OSError:
            continue
        if is_rank:
            found.append(int(process.name))
    return found


def state_of(folder: Path) -> str:
    partial = next(iter(folder.glob(".step-*.partial")), None)
    if partial is None:
        return "the save had just got its name"
    names = sorted(path.name for path in partial.iterdir() if not path.name.startswith("."))
    if MANIFEST in names:
        return "manifest written, not yet named"
    ranks = sum(name.startswith("rank") for name in names)
    return f"torn: {ranks} of 2 rank files, {'with' if checkpoints.STATE in names else 'no'} state.json, no manifest"


def report(place: Place, kills: int, seen: Counter[str]) -> int:
    straight, killed = place.rows("straight"), place.rows("killed")
    columns = ("loss", "grad_norm", "lr", "rows_digest")
    equal_steps = sum(all(straight[step][key] == killed[step][key] for key in columns) for step in straight)
    one = load_file(place.run("straight") / "weights-1.safetensors")
    other = load_file(place.run("killed") / f"weights-{kills + 1}.safetensors")
    equal_tensors = sum(torch.equal(one[name], other[name]) for name in one)
    resumes = len(place.events("killed", "resume"))
    print(f"\n{kills} kills: " + "; ".join(f"{count} x {state}" for state, count in seen.most_common()))
    print(
        f"{resumes} attempts went on from a proven checkpoint, {len(place.events('killed', 'quarantine'))} checkpoints were refused"
    )
    print(f"bit-equal: {equal_steps} of {STEPS} steps ({', '.join(columns)}), {equal_tensors} of {len(one)} tensors")
    return 0 if equal_steps == STEPS and equal_tensors == len(one) and resumes == kills else 1


if __name__ == "__main__":
    sys.exit(main())

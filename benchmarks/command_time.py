"""Where the seconds of the command go, phase by phase, beside a bare script of torch and PEFT that does the same on the same rows.

    python benchmarks/command_time.py [--job demonstration|rows] [--rounds 1] [--steps 12] [--root CHECKOUT] [OVERRIDE ...]

`demonstration` is the main job; `rows` are 983 rows of about 200 tokens (GSM8K), padded and packed, for so many steps. --root
measures another checkout (with its own .venv) in the same turns: `before` in the table. Medians over the rounds; ratios and
differences hold within one run alone. The script prepares, loads, evaluates, trains, evaluates and saves; it proves nothing.
Where processes wait for cores (/proc/pressure/cpu) the seconds are upper bounds: `chrt -f 5` in front keeps others away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import interleaving

from orchestrator.metrics.jsonl import read_rows

ROOT = Path(__file__).resolve().parent.parent
PHASES = (
    "start",
    "prepare",
    "load",
    "first evaluation",
    "first step",
    "other steps",
    "last evaluation",
    "proof",
    "end",
)
ROWS, HELD, LENGTH = 983, 40, 512
TAKEN = (120, 280)
"""Bytes of question and answer that make about 200 tokens with the chat template."""


def main() -> int:
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="command-time-") as place:
        jobs = [options.job] if options.job == "demonstration" else ["rows", "rows, packed"]
        for job in jobs:
            measure(job, options, Path(place))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("demonstration", "rows"), default="demonstration")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of the demonstration: the preset's; of rows: 12")
    parser.add_argument("--root", type=Path, help="another checkout, measured as `before`")
    parser.add_argument("--file", type=Path, default=ROOT.parent / "shared/data/math/gsm8k_train.jsonl")
    parser.add_argument("--no-script", action="store_true", help="leave the bare script out")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def measure(job: str, options: argparse.Namespace, place: Path) -> None:
    overrides = [*job_overrides(job, options, place), *options.overrides]
    contenders = {"ours": ROOT} | ({} if options.root is None else {"before": options.root.resolve()})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    bare: list[dict[str, float]] = []
    for turn in range(options.rounds):
        for name, root in contenders.items():
            run = place / "runs" / f"{name}-{turn}-{job.replace(', ', '-')}"
            found[name].append(command(root, run, overrides))
        if not options.no_script:
            bare.append(script(place / "runs" / f"ours-{turn}-{job.replace(', ', '-')}"))
    tell(job, options, found | ({"script": bare} if bare else {}))


def job_overrides(job: str, options: argparse.Namespace, place: Path) -> list[str]:
    steps = options.steps if job == "demonstration" else options.steps or 12
    words = [] if steps is None else [f"stages.sft.max_steps={steps}"]
    if job == "demonstration":
        return words
    lines = options.file.read_text(encoding="utf-8").splitlines()
    rows = [{"instruction": row["question"], "output": row["answer"]} for row in map(json.loads, lines)]
    fitting = [row for row in rows if all(TAKEN[0] < len(text) < 3 * TAKEN[1] for text in row.values())]
    for name, part in (("train", fitting[:ROWS]), ("held", fitting[ROWS : ROWS + HELD])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    words += [f"stages.sft.data.train.path={place}/train.jsonl", f"stages.sft.data.eval.path={place}/held.jsonl"]
    packed = ["stages.sft.data.packing=best_fit", "stages.sft.batch={global_size: 2, micro_size: 2}"]
    padded = ["stages.sft.batch={global_size: 4, micro_size: 4}"]
    return [*words, f"stages.sft.data.max_length={LENGTH}", *(packed if "packed" in job else padded)]


def command(root: Path, run: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Seconds of every phase of our command, from the record that it leaves."""
    argv = [str(root / ".venv/bin/python"), "-m", "orchestrator", "run", "+experiment=llama_lora"]
    began = time.time()
    done = subprocess.run(
        [*argv, f"name={run.name}", f"output_dir={run.parent}", *overrides],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{root}: {(done.stdout + done.stderr)[-3000:]}")
    return spent(run, began, ended)


def spent(run: Path, began: float, ended: float) -> dict[str, float]:
    stage = run / "sft"
    at = {row["event"]: row for row in read_rows(stage / "events.jsonl")}
    rows = read_rows(stage / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    scored = [row for row in rows if "eval_seconds" in row]
    edges = [
        began,
        at["start"]["began"],
        at["start"]["time"],
        at["train"]["time"] - scored[0]["eval_seconds"],
        at["train"]["time"],
        steps[0]["time"],
        at["trained"]["time"],
        scored[-1]["time"],
        at["finish"]["time"],
        ended,
    ]
    seconds = dict(zip(PHASES, (after - before for before, after in itertools.pairwise(edges)), strict=True))
    rate = sum(row["tokens"] for row in steps[1:]) / sum(row["step_seconds"] for row in steps[1:])
    held_rate = held_tokens(stage) / scored[-1]["eval_seconds"]
    return {**seconds, "tokens/s": rate, "held-out tokens/s": held_rate, "held-out loss": scored[-1]["eval_loss"]}


def held_tokens(stage: Path) -> int:
    from orchestrator.dataloader.prepared_rows import PreparedRows

    return int(PreparedRows.open(Path(json.loads((stage / "prepared.json").read_text())["evaluation"])).lengths.sum())


def script(run: Path) -> dict[str, float]:
    """The same in a plain script, started as a process of its own."""
    began = time.time()
    argv = [sys.executable, str(ROOT / "benchmarks/bare_script.py"), str(run / "run.json")]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"the bare script: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    edges = [began, *found["edges"], time.time()]
    names = ("start", "prepare", "load", "first evaluation", "first step", "other steps", "last evaluation", "end")
    seconds = {name: after - before for name, before, after in zip(names, edges, edges[1:], strict=False)}
    return {**seconds, **found["rates"], "proof": 0.0}


def tell(job: str, options: argparse.Namespace, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(
        f"\n{job}, {options.rounds} round(s), {os.cpu_count()} cores, waiting for a core: {interleaving.pressure():.0f} %\n"
    )
    print(f"| | {' | '.join(medians)} |\n|---{'|---' * len(medians)}|")
    for values in medians.values():
        values["to the first step, without the evaluation"] = (
            sum(values[key] for key in PHASES[:3]) + values["first step"]
        )
        values["after the last step"] = sum(values[key] for key in PHASES[6:])
        values["in all"] = sum(values[key] for key in PHASES)
    for key in next(iter(medians.values())):
        digits = 4 if "loss" in key else 1
        print(f"| {key} | {' | '.join(f'{values[key]:.{digits}f}' for values in medians.values())} |")
    ours = medians["ours"]
    for name, values in medians.items():
        if name != "ours":
            first = (
                ours["to the first step, without the evaluation"] - values["to the first step, without the evaluation"]
            )
            print(
                f"ours over {name}: {ours['in all'] / values['in all']:.2f} of its seconds, first step {first:+.1f} s"
            )
    print(f"evaluation over training: {ours['held-out tokens/s'] / ours['tokens/s']:.2f} times the tokens a second")


if __name__ == "__main__":
    sys.exit(main())

"""Our training beside plain loops and other trainers on the same rows: real tokens a second, seconds a step, start, memory, loss.

    python benchmarks/train.py [--file ROWS.jsonl] [--columns JSON] [--steps 8] [--rounds 3] [--only ours_packed,raw_packed]

SmolLM2-135M, LoRA r=16 on all linear layers, bf16, loss on the answers, rows of at most 512 tokens, 8 rows a padded step, and as
many packed rows as hold about as many real tokens. Every contender runs in a process of its own, interleaved over the rounds;
ours through its own command. The first two steps of a run warm up and are left out. `raw` is a plain torch loop with PEFT,
`raw_packed` the packing of LLaMA-Factory and others (best fit, dense mask by document), `trainer` transformers' Trainer, `trl`
TRL's SFTTrainer. Where processes wait for cores (/proc/pressure/cpu) no verdict is given.
"""

from __future__ import annotations

import argparse
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

import inputs
import interleaving

from orchestrator.metrics.jsonl import read_rows

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("raw_padded", "raw_grouped", "raw_packed", "trainer_padded", "trl_default", "trl_packing")
OURS = {
    "ours_padded": [],
    "ours_grouped": ["stages.sft.data.group_by_length=true"],
    "ours_packed": ["stages.sft.data.packing=best_fit"],
}
WARM_UP = 2
HELD_ROWS = 16
RATE = 2e-4


def main() -> int:
    options = parsed()
    names = options.only.split(",") if options.only else [*OURS, *PEERS]
    with tempfile.TemporaryDirectory(prefix="train-benchmark-") as place:
        spec = prepared(options, Path(place))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        waits: list[float] = []
        for turn in range(options.rounds):
            for name in names:
                waits.append(interleaving.pressure())
                run = ours(name, spec, turn) if name in OURS else peer(name, spec)
                found[name].append(run)
                print(f"round {turn + 1}, {name}: {rate_of(run):.0f} real tokens/s", file=sys.stderr, flush=True)
    tell(options, spec, found, waits)
    if options.plot is not None:
        draw(options.plot, {name: [rate_of(run) for run in runs] for name, runs in found.items()})
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=ROOT.parent / "shared/data/math/gsm8k_train.jsonl")
    parser.add_argument("--columns", type=json.loads, default={"instruction": "question", "output": "answer"})
    parser.add_argument("--rows", type=int, default=1000, help="rows that are taken from the file")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of a padded step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="a PNG of the rates")
    parser.add_argument("--only", default="", help=f"of {', '.join([*OURS, *PEERS])}")
    return parser.parse_args()


def prepared(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The rows, tokenised once for all: padded, packed and held out."""
    from orchestrator.data.preparation.prepare import ensure_prepared
    from orchestrator.dataloader.prepared_rows import PreparedRows

    lines = options.file.read_text(encoding="utf-8").splitlines()
    train, held = place / "train.jsonl", place / "held.jsonl"
    train.write_text("\n".join(lines[: options.rows]) + "\n", encoding="utf-8")
    held.write_text("\n".join(lines[options.rows : options.rows + HELD_ROWS]) + "\n", encoding="utf-8")
    model = inputs.base_folder()
    folders = {}
    for name, path, packing in (("padded", train, "none"), ("packed", train, "best_fit"), ("held", held, "none")):
        settings = inputs.data_config(
            path, options.columns, max_length=options.length, truncation="accept", packing=packing
        )
        ready = ensure_prepared(settings, tokenizer_folder=model, cache=place / "cache", seed=0, say=lambda _: None)
        folders[name] = str(ready.train)
    rows = PreparedRows.open(Path(folders["padded"]))
    mean = float(rows.lengths.mean())
    packed_rows = max(1, round(options.batch * mean / options.length))
    spec = {
        **folders,
        "model": str(model),
        "file": str(train),
        "held_file": str(held),
        "columns": options.columns,
        "place": str(place),
        "scratch": str(place / "scratch"),
        "rank": 16,
        "lr": RATE,
        "length": options.length,
        "steps": options.steps,
        "all_steps": rows.rows // options.batch,
        "padded_rows": options.batch,
        "packed_rows": packed_rows,
        "held_rows": HELD_ROWS,
        "mean": mean,
    }
    (place / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return spec


def peer(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    argv = [sys.executable, str(ROOT / "benchmarks/peers.py"), name, f"{spec['place']}/spec.json"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(spec))
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(spec: Mapping[str, Any]) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def ours(name: str, spec: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """Our own command; its steps are read from metrics.jsonl."""
    size = spec["packed_rows" if name == "ours_packed" else "padded_rows"]
    run = Path(spec["place"]) / "runs" / f"{name}-{turn}"
    columns = [
        f"+stages.sft.data.{place}.columns.{key}={value}"
        for place in ("train", "eval")
        for key, value in spec["columns"].items()
    ]
    words = [
        "+experiment=llama_lora",
        f"name={run.name}",
        f"output_dir={run.parent}",
        f"stages.sft.data.train.path={spec['file']}",
        f"stages.sft.data.eval.path={spec['held_file']}",
        *columns,
        f"stages.sft.data.max_length={spec['length']}",
        "stages.sft.data.truncation=accept",
        f"stages.sft.batch.global_size={size}",
        f"stages.sft.batch.micro_size={size}",
        f"stages.sft.max_steps={spec['steps']}",
        "stages.sft.checkpoint.rehearse=false",
        "stages.sft.checkpoint.probe_rows=0",
        "schedule@stages.sft.schedule=constant",
        "stages.sft.schedule.warmup_ratio=0",
        f"stages.sft.optimizer.lr={spec['lr']}",
        "stages.sft.optimizer.weight_decay=0",
        f"tuning.rank={spec['rank']}",
        f"tuning.alpha={2 * spec['rank']}",
        "tracking=none",
        "launcher=local",
        *OURS[name],
    ]
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", *words], capture_output=True, text=True, env=environment(spec)
    )
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stdout + done.stderr)[-3000:]}")
    rows = [row for row in read_rows(run / "sft/metrics.jsonl") if "loss" in row]
    result = json.loads((run / "sft/result.json").read_text(encoding="utf-8"))
    steps = [
        {
            "seconds": row["step_seconds"],
            "cpu_seconds": None,
            "tokens": row["tokens"],
            "trained_tokens": row["trained_tokens"],
        }
        for row in rows
    ]
    return {
        "steps": steps,
        "first_step_seconds": first_step(run) - began,
        "peak_gib": max(row["memory_gib"] for row in rows),
        "held_loss": result["eval_loss_after"],
    }


def first_step(run: Path) -> float:
    """When the first step ended, less the evaluation before it, which the others do not make."""
    rows = read_rows(run / "sft/metrics.jsonl")
    evaluated = sum(row["eval_seconds"] for row in rows if row.get("step") == 0 and "eval_seconds" in row)
    return next(row["time"] for row in rows if "loss" in row) - evaluated


def rate_of(run: Mapping[str, Any], key: str = "tokens") -> float:
    steps = run["steps"][WARM_UP:]
    return sum(step[key] for step in steps) / sum(step["seconds"] for step in steps)


def tell(
    options: argparse.Namespace, spec: Mapping[str, Any], found: Mapping[str, Sequence[Any]], waits: Sequence[float]
) -> None:
    """The table: medians over the rounds, the spread of the rate, and its ratio to the padded plain loop."""
    rates = {name: statistics.median(rate_of(run) for run in runs) for name, runs in found.items()}
    base = rates.get("raw_padded", next(iter(rates.values())))
    print(
        f"{options.file.name}, {spec['mean']:.0f} tokens a row, {spec['padded_rows']} padded or {spec['packed_rows']} packed "
        f"rows a step, {options.steps - WARM_UP} steps, {options.rounds} rounds, {os.cpu_count()} cores"
    )
    print("| contender | real tokens/s | spread | ratio | s a step | trained tokens/s | to the first step | peak GiB |"
          " held-out loss |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        every = [rate_of(run) for run in runs]
        seconds = statistics.median(step["seconds"] for run in runs for step in run["steps"][WARM_UP:])
        cells = {key: statistics.median(run[key] for run in runs) for key in ("first_step_seconds", "peak_gib")}
        trained = statistics.median(rate_of(run, "trained_tokens") for run in runs)
        loss = statistics.median(run["held_loss"] for run in runs)
        print(
            f"| {name} | {rates[name]:.0f} | {(max(every) - min(every)) / rates[name]:.0%} | {rates[name] / base:.2f} "
            f"| {seconds:.2f} | {trained:.0f} | {cells['first_step_seconds']:.1f} | {cells['peak_gib']:.1f} | {loss:.4f} |"
        )
    print(f"processes waited for a core before the runs: {statistics.median(waits):.0f} % (most {max(waits):.0f} %)")
    if statistics.median(waits) > interleaving.BUSY_PERCENT:
        print("the machine was busy: no verdict")


def draw(path: Path, rates: Mapping[str, Sequence[float]]) -> None:
    """A bar for the median of every contender, the slowest at the bottom, with a line from its lowest to its highest round."""
    from matplotlib.figure import Figure

    order = sorted(rates, key=lambda name: statistics.median(rates[name]))
    medians = [statistics.median(rates[name]) for name in order]
    figure = Figure(figsize=(6.4, 0.36 * len(order) + 0.8), layout="constrained")
    axes = figure.subplots()
    colours = ["#2a6f97" if name in OURS else "#b8b8b8" for name in order]
    reach = [
        [median - min(rates[name]) for name, median in zip(order, medians, strict=True)],
        [max(rates[name]) - median for name, median in zip(order, medians, strict=True)],
    ]
    axes.barh(
        [name.replace("_", ", ", 1) for name in order], medians, color=colours, xerr=reach, error_kw={"linewidth": 1}
    )
    for place, median in enumerate(medians):
        axes.text(
            8, place, f"{median:.0f}", va="center", fontsize=8, color="white" if colours[place][1] == "2" else "black"
        )
    axes.set_xlabel("real tokens a second (median; line: lowest to highest round)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())

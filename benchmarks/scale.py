"""The training loop over raw DeepSpeed at several gloo ranks: the same model, rows, micro-batches, optimizer and DeepSpeed dict.

    python benchmarks/scale.py [--ranks 1,2,4] [--shardings zero2,zero3] [--steps 12] [--rounds 3]

SmolLM2-135M, LoRA r=16 on all linear layers, bf16, one thread a rank. `raw` is deepspeed.initialize, engine(batch), engine.backward,
engine.step in a plain loop with whole logits; `ours` the whole command, read from metrics.jsonl. Every run is a set of processes of its
own, interleaved over the rounds; the first three steps warm up (ZeRO-3 records its trace in them). Where processes wait for cores
before a run no verdict is given. The times of rendering for and of asking after thousands of nodes and jobs: benchmarks/launch.py.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import interleaving
import peers
import train

WARM_UP = 3
COLUMNS = {"instruction": "instruction", "input": "input", "output": "output"}


def main() -> int:
    options = parsed()
    if options.raw is not None:
        raw(json.loads(options.raw.read_text(encoding="utf-8")))
        return 0
    print("| ranks | sharding | raw s a step (spread) | ours | ours / raw | waiting for cores |\n|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for ranks in map(int, options.ranks.split(",")):
        with tempfile.TemporaryDirectory(prefix="scale-benchmark-") as place:
            options.batch = max(options.batch, ranks)
            spec = train.prepared(options, Path(place))
            for sharding in options.shardings.split(","):
                row_of(options, spec, ranks, sharding)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=train.ROOT.parent / "shared/data/sft/lfs_instruction_1100.jsonl")
    parser.add_argument("--columns", type=json.loads, default=COLUMNS)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step over all ranks")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--shardings", default="zero2,zero3")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def row_of(options: argparse.Namespace, spec: Mapping[str, Any], ranks: int, sharding: str) -> None:
    """Prints the medians of both over the rounds."""
    found: dict[str, list[list[float]]] = {"raw": [], "ours": []}
    waits: list[float] = []
    for turn in range(options.rounds):
        run = Path(spec["place"]) / "runs" / f"{sharding}-{ranks}-{turn}"
        words = words_of(spec, run, ranks, sharding)
        for name, steps in found.items():
            waits.append(interleaving.settled_pressure())
            steps.append((raw_steps if name == "raw" else our_steps)(spec, words, run, ranks))
            print(
                f"{sharding}, {ranks} ranks, {name}: {statistics.median(steps[-1]):.3f} s", file=sys.stderr, flush=True
            )
    raw_s, ours_s = (statistics.median(second for run in found[name] for second in run) for name in found)
    medians = [statistics.median(run) for run in found["raw"]]
    verdict = f"{ours_s / raw_s:.3f}" if statistics.median(waits) <= interleaving.BUSY_PERCENT else "busy: no verdict"
    print(
        f"| {ranks} | {sharding} | {raw_s:.3f} ({(max(medians) - min(medians)) / raw_s:.0%}) | {ours_s:.3f} | {verdict} "
        f"| {statistics.median(waits):.0f} % |",
        flush=True,
    )


def words_of(spec: Mapping[str, Any], run: Path, ranks: int, sharding: str) -> list[str]:
    below = [
        *(f"data.train.columns.{key}={value}" for key, value in spec["columns"].items()),
        f"data.train.path={spec['file']}",
        "data.eval.path=none",
        f"data.max_length={spec['length']}",
        "data.truncation=accept",
        "data.packing=none",
        f"batch.global_size={spec['padded_rows']}",
        f"batch.micro_size={spec['padded_rows'] // ranks}",
        f"max_steps={spec['steps']}",
        "schedule.warmup_ratio=0",
        f"optimizer.lr={spec['lr']}",
        "optimizer.weight_decay=0",
        "checkpoint.every_steps=null",
        "checkpoint.rehearse=false",
        "checkpoint.probe_rows=0",
    ]
    return [
        "+experiment=llama_lora",
        f"name={run.name}",
        f"output_dir={run.parent}",
        "schedule@stages.sft.schedule=constant",
        *("+" * (".columns." in word) + f"stages.sft.{word}" for word in below),
        f"tuning.rank={spec['rank']}",
        f"tuning.alpha={2 * spec['rank']}",
        f"sharding={sharding}",
        f"cluster.processes_per_node={ranks}",
        "tracking=none",
        "launcher=torchrun",
    ]


def environment(spec: Mapping[str, Any]) -> dict[str, str]:
    return {**train.environment(spec), "OMP_NUM_THREADS": "1"}


def our_steps(spec: Mapping[str, Any], words: list[str], run: Path, ranks: int) -> list[float]:
    argv = [sys.executable, "-m", "orchestrator", "run", *words]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(spec), check=False)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    rows = [row for row in train.read_rows(run / "sft/metrics.jsonl") if "loss" in row]
    return [float(str(row["step_seconds"])) for row in rows][WARM_UP:]


def raw_steps(spec: Mapping[str, Any], words: list[str], run: Path, ranks: int) -> list[float]:
    """The plain loop at as many ranks, with the DeepSpeed dict of our run, which is rendered for it."""
    from orchestrator.architecture.deepspeed import deepspeed_dict
    from orchestrator.config.run import RunConfig

    rendered = [sys.executable, "-m", "orchestrator", "render", *words]
    subprocess.run(rendered, capture_output=True, env=environment(spec), check=True)
    config = RunConfig.model_validate(json.loads((run / "run.json").read_text())["config"], strict=False)
    told = Path(spec["place"]) / "raw.json"
    told.write_text(json.dumps({**spec, "ranks": ranks, "deepspeed": deepspeed_dict(config, config.stages["sft"])}))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    done = subprocess.run(
        [*argv, "--raw", str(told)], capture_output=True, text=True, env=environment(spec), check=False
    )
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[")))[WARM_UP:]


def raw(spec: Mapping[str, Any]) -> None:
    """One rank of the plain loop; rank 0 prints its seconds."""
    import deepspeed
    import torch

    from orchestrator.data.order import BatchOrder
    from orchestrator.dataloader.prepared_rows import PreparedRows
    from orchestrator.files.cache import compiled_folder

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled_folder()))
    deepspeed.init_distributed("gloo")
    rank, ranks = int(os.environ["RANK"]), spec["ranks"]
    model = peers.adapted(spec)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=spec["deepspeed"])
    rows = PreparedRows.open(Path(spec["padded"]))
    order = BatchOrder(rows.rows, spec["padded_rows"], 0)
    engine.train()
    seconds = []
    for step in range(spec["steps"]):
        start = time.perf_counter()
        micro = order.micro_batches(step, rank=rank, world_size=ranks, micro_size=spec["padded_rows"] // ranks)
        for indices in micro:
            batch = rows.batch(indices)
            logits_BTV = engine(
                input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), batch.labels_BT[:, 1:].flatten(), ignore_index=-100
            )
            engine.backward(loss)
            engine.step()
        float(loss)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

"""How long training stands still for a checkpoint: written in the background against blocking, and what hashing costs.

    python benchmarks/checkpoint.py                       SmolLM2-135M, full fine-tuning, one process (about 3 minutes, 6 GiB)
    python benchmarks/checkpoint.py --lora                the same with LoRA, and the size of its checkpoint

Both ways are measured in one run, in turns, with the real Checkpointer on the real model; medians are printed as Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.distributed.runtime import start_runtime
from orchestrator.files.cache import cache_folder
from orchestrator.metrics.jsonl import read_rows
from orchestrator.models.loading import fetch_base, load_model
from orchestrator.models.tuning import apply_tuning
from orchestrator.planning.absolute_paths import resolve
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_folder.stop_request import StopRequest
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.checkpointing.checkpointer import CheckpointedState, Checkpointer
from orchestrator.training.loop_state import Progress
from orchestrator.training.optimizer import build_optimizer

ROUNDS = 4
"""Of each way; the first round pays for fresh memory and is told apart."""
TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), "+experiment=llama_lora" if options.lora else "+experiment=llama_full")


def measure(folder: Path, experiment: str) -> None:
    config = resolve(
        compose([experiment, "tracking=none", f"output_dir={folder}", "stages.sft.checkpoint.keep_last=1"]), folder
    )
    base = fetch_base(config.model, cache=cache_folder(), say=print)
    runtime = start_runtime(config, config.stages["sft"])
    model = apply_tuning(load_model(base, config, weights_dtype=torch.float32), config)
    optimizer = build_optimizer(model, config.stages["sft"].optimizer)
    model, optimizer = runtime.accelerator.prepare(model, optimizer)
    step_seconds = [_step(model, optimizer) for _ in range(3)][1:]
    subject = CheckpointedState(runtime=runtime, model=model, optimizer=optimizer, data_digest="", probe=None)
    savers = {
        way: _checkpointer(config, folder, subject, background=way == "background")
        for way in ("blocking", "background")
    }
    stalls: dict[str, list[float]] = {way: [] for way in savers}
    beside: list[float] = []
    for number in range(1, ROUNDS + 1):
        for way, saver in savers.items():
            start = time.perf_counter()
            saver.save(Progress(step=number, tokens=0, trained_tokens=0))
            stalls[way].append(time.perf_counter() - start)
            if way == "background":
                beside.append(_step(model, optimizer))
            saver._writer.wait()
    for saver in savers.values():
        saver.close()
    _report(folder, stalls, step_seconds, beside)
    found = checkpoints.verify(RunFolder(folder / "blocking").stage("sft").checkpoint(ROUNDS))
    _report_hashing(found.rank_files[0])


def _checkpointer(config: RunConfig, folder: Path, subject: CheckpointedState, *, background: bool) -> Checkpointer:
    stage = config.stages["sft"]
    settings = stage.checkpoint.model_copy(update={"background": background})
    context = StageContext(
        config=config,
        name="sft",
        stage=stage.model_copy(update={"checkpoint": settings}),
        folder=RunFolder(folder / ("background" if background else "blocking")).stage("sft"),
        run_file=folder / "run.json",
        attempt=1,
        stop=StopRequest(folder / "STOP"),
        base_folder=folder,
        train_data=folder,
        evaluation_data=None,
    )
    return Checkpointer(context, replace(subject), Recorder(context, rank=0))


def _step(model: Any, optimizer: Any) -> float:
    """Seconds of one optimizer step on 128 tokens."""
    start = time.perf_counter()
    ids_BT = torch.randint(0, 1000, (1, TOKENS))
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def _report(folder: Path, stalls: dict[str, list[float]], step_seconds: list[float], beside: list[float]) -> None:
    print("\n| way | training stands still, s (first save) | median of the later ones, s | written after, s (median) |")
    print("|---|---|---|---|")
    for way, seconds in stalls.items():
        saves = [row for row in read_rows(RunFolder(folder / way).stage("sft").events) if row["event"] == "save"]
        written = statistics.median(float(str(row["save_seconds"])) for row in saves[1:])
        print(f"| {way} | {seconds[0]:.2f} | {statistics.median(seconds[1:]):.2f} | {written:.2f} |")
    print(
        f"\na step takes {statistics.median(step_seconds):.2f} s alone, {statistics.median(beside[1:]):.2f} s beside a write"
    )


def _report_hashing(path: Path) -> None:
    """What of a blocking save is hashing: the same bytes, written, hashed in memory, read back and hashed."""
    content = path.read_bytes()
    start = time.perf_counter()
    hashlib.sha256(content).digest()
    hashed = time.perf_counter() - start
    copy = path.with_name("copy")
    start = time.perf_counter()
    with open(copy, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    start = time.perf_counter()
    with open(copy, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(8 << 20):
            pass
    read = time.perf_counter() - start
    copy.unlink()
    print(
        f"\n{len(content) / 2**20:.1f} MiB: written and fsynced in {written:.2f} s; hashing them adds {hashed:.2f} s, reading them back {read:.2f} s"
    )
    print(
        f"and hashing that again {hashed:.2f} s: proof costs {(2 * hashed + read) / written:.0%} of the bare write, off the training thread"
    )


if __name__ == "__main__":
    main()

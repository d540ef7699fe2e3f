"""What the number type costs on a processor, and what `model.dtype=auto` takes on which hardware.

`python benchmarks/dtype.py steps [--layers 6] [--steps 3] [--threads N]`: seconds of a LoRA step (4 rows of 64 tokens, SmolLM2-135M's
shapes with fewer layers, random weights) in float32 and bfloat16, as the processor is and as one without AVX-512
(ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2), each in a process of its own; medians of wall-clock and of processor time, which
other work on the machine does not touch. A type gets `--seconds` at most, and one step at least.

`python benchmarks/dtype.py hardware`: what auto takes on every file of conf/hardware/ and on this machine, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

OLD = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ROWS, LENGTH = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "hardware", "one"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    {"steps": steps, "hardware": hardware, "one": one}[options.what](options)


def steps(options: argparse.Namespace) -> None:
    """The table; each cell in a process of its own, since both libraries read their variable once."""
    print(f"{'processor':<22} {'type':<9} {'wall s':>8} {'cpu s':>8}  steps")
    for name, limits in (("as it is", {}), ("as AVX2", OLD)):
        cells: dict[str, dict[str, float]] = {}
        for dtype in ("float32", "bfloat16"):
            argv = [sys.executable, __file__, "one", "--dtype", dtype, "--layers", str(options.layers)]
            argv += ["--steps", str(options.steps), "--seconds", str(options.seconds)]
            environment = {**os.environ, **limits, "OMP_NUM_THREADS": str(options.threads)}
            ended = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True)
            cells[dtype] = cell = json.loads(ended.stdout.splitlines()[-1])
            print(f"{name:<22} {dtype:<9} {cell['wall']:>8.2f} {cell['cpu']:>8.2f}  {cell['steps']:.0f}", flush=True)
        ratios = {clock: cells["bfloat16"][clock] / cells["float32"][clock] for clock in ("wall", "cpu")}
        print(f"{name:<22} {'ratio':<9} {ratios['wall']:>8.1f} {ratios['cpu']:>8.1f}", flush=True)


def one(options: argparse.Namespace) -> None:
    """The steps of one type, as JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shapes: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": options.layers}
    base = LlamaForCausalLM(LlamaConfig(**shapes, **heads, tie_word_embeddings=True))
    base = base.to(getattr(torch, options.dtype))
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    ids_BT = torch.randint(0, 49152, (ROWS, LENGTH))
    wall: list[float] = []
    cpu: list[float] = []
    until = time.perf_counter() + options.seconds
    # the first step compiles kernels, and counts only where there is no time for another
    while len(wall) < options.steps + 1 and (not wall or time.perf_counter() < until):
        began = (time.perf_counter(), time.process_time())
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    counted = {"wall": median(wall[1:] or wall), "cpu": median(cpu[1:] or cpu), "steps": len(wall[1:] or wall)}
    print(json.dumps(counted))


def hardware(options: argparse.Namespace) -> None:
    """By the hardware file alone, as under Slurm; then this machine."""
    from orchestrator.composition.compose import compose, presets
    from orchestrator.config.cluster import HardwareConfig
    from orchestrator.machine.dtype import choose
    from orchestrator.machine.this_machine import this_machine

    machine, config = this_machine(), compose(["+experiment=llama_lora", "launcher=slurm"])
    for name, values in sorted(presets("hardware").items()):
        cluster = config.cluster.model_copy(update={"hardware": HardwareConfig.model_validate(values)})
        dtype, reason = choose(config.model_copy(update={"cluster": cluster}), machine)
        print(f"| `{name}` | {dtype} | {reason} |")
    dtype, reason = choose(compose(["+experiment=llama_lora", "launcher=local"]), machine)
    print(f"| this machine | {dtype} | {reason} |")


if __name__ == "__main__":
    main()

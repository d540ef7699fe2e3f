"""One rank that loads models and writes what they hold, and what loading them took, to files.

argv: JSON list of cells. World size and rank come from the environment.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from orchestrator.classification.classes import Classes
from orchestrator.classification.model import load_classifier
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.distributed.gather import gathered
from orchestrator.distributed.runtime import start_scoring_runtime
from orchestrator.models.artifact import open_model
from orchestrator.models.loading import load_model, load_scorer
from orchestrator.models.peft_adapters import apply_loftq_init
from orchestrator.models.tuning import apply_tuning
from orchestrator.models.weight_stream import placed_on
from orchestrator.planning.absolute_paths import resolve


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to load: `sharding`, whether its base is in 4 bits, and a `device` that it is loaded onto whole."""

    name: str
    folder: str
    out: str
    sharding: str = "zero3"
    kind: str = "model"
    nf4: bool = False
    device: str | None = None
    rows: str = ""
    words: tuple[str, ...] = ()
    """Overrides of what is adapted, where `kind` is policy."""


def resident(peak: str = "VmRSS") -> float:
    """Resident memory in MiB, or with `VmHWM` its peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{peak}:")) / 1024


def forget_peak() -> None:
    """Give freed memory back and set the kernel's peak to what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _load(cell: Cell, config: RunConfig) -> Any:
    folder = Path(cell.folder)
    match cell.kind:
        case "model":
            return load_model(folder, config, weights_dtype=torch.float32)
        case "policy":
            return adapted(load_model(folder, config, weights_dtype=torch.float32), folder, config)
        case "artifact":
            return open_model(folder, config, torch.float32, packed=False)
        case "scorer":
            return load_scorer(folder, config, weights_dtype=torch.float32, packed=False)
        case _:
            classes = Classes(problem="single_label", names=("a", "b", "c"))
            return load_classifier(folder, config, classes, weights_dtype=torch.float32, packed=False)


def adapted(base: Any, folder: Path, config: RunConfig) -> Any:
    """The base with a new adapter."""
    model = apply_tuning(base, config)
    if config.tuning.is_loftq:
        apply_loftq_init(model, folder)
    return model


def config_of(cell: Cell, *, ranks: int) -> RunConfig:
    words = [
        f"model.base={cell.folder}",
        "model.dtype=float32",
        "cluster.device=cpu",
        f"stages.sft.data.train.path={cell.rows}",
        "stages.sft.data.eval.path=none",
        f"sharding={cell.sharding}",
        f"cluster.processes_per_node={ranks}",
        *(("quantization=nf4",) if cell.nf4 else ()),
        *cell.words,
    ]
    return resolve(compose(["+experiment=llama_lora", *words]), Path.cwd())


def _digest(tensor: torch.Tensor) -> str:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def contents(model: Any) -> dict[str, str]:
    """Digests of all parameters, whole, their statistics, and buffers."""
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            found[name] = _digest(parameter.data)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found |= {
                f"{name}.{key}": _digest(value) for key, value in state.as_dict().items() if hasattr(value, "cpu")
            }
    return found | {name: _digest(buffer) for name, buffer in model.named_buffers()}


def run(cell: Cell) -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE")]:
        del os.environ[name]
    config = config_of(cell, ranks=int(os.environ.get("WORLD_SIZE", "1")))
    runtime = start_scoring_runtime(config, autocast=False)
    torch.manual_seed(0)
    chosen = placed_on(torch.device(cell.device)) if cell.device else nullcontext()
    forget_peak()
    before = resident()
    with chosen:
        model = _load(cell, config)
    growth = resident("VmHWM") - before
    shards = sum(hasattr(parameter, "ds_id") for parameter in model.parameters())
    whole = {} if cell.device == "meta" else contents(model)
    answer = {
        "growth": growth,
        "shards": shards,
        "of": len(list(model.parameters())),
        "contents": whole,
    }
    Path(cell.out).mkdir(exist_ok=True)
    Path(cell.out, f"{cell.name}-{runtime.rank}.json").write_text(json.dumps(answer))
    runtime.barrier()


def main() -> None:
    for values in json.loads(sys.argv[1]):
        run(Cell(**values))
        gc.collect()
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

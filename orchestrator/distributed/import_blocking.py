"""Keeps out of a process what its run does not need. Must be asked before transformers and PEFT are imported."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.config.run import RunConfig, training_stages

BITSANDBYTES = "bitsandbytes"
DEEPSPEED = "deepspeed"


@contextmanager
def uncollected() -> Generator[None]:
    """Imports make objects by the hundred thousand and leave none to collect: the collector would look at all again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave_out_deepspeed(config: RunConfig) -> None:
    """Makes DeepSpeed look as if it were not installed where the run shards nothing: Accelerate imports it whenever it can, to
    ask whether a model is DeepSpeed's. Must be asked before transformers is imported, which looks for it once.
    """
    if not config.sharding.is_deepspeed:
        sys.modules.setdefault(DEEPSPEED, None)  # pyright: ignore[reportArgumentType]  # None is how an import is blocked


def leave_out_unused(config: RunConfig, base_folder: Path) -> None:
    """Makes bitsandbytes look as if it were not installed where nothing of the run uses it: PEFT imports it whenever it can, which
    costs a fifth of a process's start (it compiles its kernels' wrappers with torch's inductor).

    None in `sys.modules` is Python's own way to say that a module is not there.
    """
    if not needs_bitsandbytes(config, base_folder):
        sys.modules.setdefault(BITSANDBYTES, None)  # pyright: ignore[reportArgumentType]  # likewise


def needs_bitsandbytes(config: RunConfig, base_folder: Path) -> bool:
    """Whether weights are held in 4 bits, come quantised, or an optimizer keeps its states in 8 bits or in pages."""
    comes_quantised = "quantization_config" in (base_folder / "config.json").read_text(encoding="utf-8")
    names = {stage.optimizer.name for stage in training_stages(config).values()}
    return comes_quantised or config.quantization.is_4bit or bool(names - {"adamw"})

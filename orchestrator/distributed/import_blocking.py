"""Keeps out libraries that the run does not need. Must be called before transformers and PEFT are imported."""

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
def garbage_collection_paused() -> Generator[None]:
    """Imports create hundreds of thousands of objects and no garbage: the collector would rescan them all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave_out_deepspeed(config: RunConfig) -> None:
    """Make DeepSpeed appear uninstalled if the run shards nothing: Accelerate imports it whenever it can, to
    check whether a model is DeepSpeed's. Must be called before transformers is imported, which looks for it once.
    """
    if not config.sharding.is_deepspeed:
        sys.modules.setdefault(DEEPSPEED, None)  # pyright: ignore[reportArgumentType]  # None is how an import is blocked


def leave_out_unused(config: RunConfig, base_folder: Path) -> None:
    """Make bitsandbytes appear uninstalled if the run does not use it: PEFT imports it whenever it can, which
    costs a fifth of a process's start (it compiles its kernels' wrappers with torch's inductor).

    None in `sys.modules` is Python's own way to mark a module as absent.
    """
    if not needs_bitsandbytes(config, base_folder):
        sys.modules.setdefault(BITSANDBYTES, None)  # pyright: ignore[reportArgumentType]  # likewise


def needs_bitsandbytes(config: RunConfig, base_folder: Path) -> bool:
    """Whether weights are held in 4 bits or come quantised, or an optimizer keeps 8-bit or paged states."""
    comes_quantised = "quantization_config" in (base_folder / "config.json").read_text(encoding="utf-8")
    names = {stage.optimizer.name for stage in training_stages(config).values()}
    return comes_quantised or config.quantization.is_4bit or bool(names - {"adamw"})

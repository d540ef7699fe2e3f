"""Compiles what DeepSpeed compiles at its first use, into the cache of this environment: `python tests/compile_extensions.py`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from orchestrator.files.cache import compiled_folder

BUILDERS = ("ShareMemCommBuilder",)
"""Of the collectives between ranks on one machine; no test offloads an optimizer, which would need CPUAdamBuilder."""

STALE_SECONDS = 600
"""Torch waits for the lock of another compilation without end, also where that one was killed."""


def main() -> None:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled_folder()))
    from deepspeed.accelerator import get_accelerator

    print(f"compiling DeepSpeed's extensions into {os.environ['TORCH_EXTENSIONS_DIR']} (a minute at the first time)")
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS:
            lock.unlink(missing_ok=True)
            print(f"removed {lock}, which a compilation that was killed had left")
    for name in BUILDERS:
        get_accelerator().create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    main()

"""Compiles what DeepSpeed compiles at its first use, into the cache of this environment: `python tests/compile_extensions.py`."""

from __future__ import annotations

import os

from orchestrator.cache import compiled_folder

BUILDERS = ("ShareMemCommBuilder",)
"""Of the collectives between ranks on one machine; no test offloads an optimizer, which would need CPUAdamBuilder."""


def main() -> None:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled_folder()))
    from deepspeed.accelerator import get_accelerator

    print(f"compiling DeepSpeed's extensions into {os.environ['TORCH_EXTENSIONS_DIR']} (a minute at the first time)")
    for name in BUILDERS:
        get_accelerator().create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    main()

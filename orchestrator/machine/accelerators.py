"""The GPUs that torch will see on this machine, found without importing torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

QUERIES = ("compute_cap,name", "gpu_bus_id,name")
"""Queries; the second is for drivers without `compute_cap`: the bus number is no capability, and the name remains."""
QUERY_SECONDS = 10
"""Timeout of the driver's answer, so that it cannot delay a plan."""
KFD = Path("/dev/kfd")
"""AMD's compute device, present with ROCm's driver."""
BFLOAT16_SINCE = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bfloat16 matrix units (Ampere)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    capability: tuple[int, int] | None
    """NVIDIA's compute capability; None if it is unknown, or the GPU is AMD's."""

    @property
    def has_native_bfloat16(self) -> bool:
        """Whether bfloat16 is native; assumed for unknown GPUs: NVIDIA's have had it since 2020, and AMD's that ROCm
        still supports have it.
        """
        return self.capability is None or self.capability >= BFLOAT16_SINCE

    def bfloat16_reason(self) -> str:
        """Why bfloat16 is native there, or is not."""
        if self.capability is None:
            return f"{self.name} is assumed to compute bfloat16 natively; the ranks check it"
        capability = ".".join(map(str, self.capability))
        if self.has_native_bfloat16:
            return f"{self.name} computes bfloat16 natively (compute capability {capability})"
        return (
            f"{self.name} (compute capability {capability}) does not compute bfloat16 natively; float16 is not "
            "supported yet"
        )


@lru_cache(maxsize=1)
def oldest_gpu() -> Gpu | None:
    """The visible GPU with the lowest compute capability, since a run uses all of them; None if torch will see none."""
    built_for = torch_build()
    if built_for == "hip" and KFD.exists():
        return Gpu(name="the AMD GPU", capability=None)
    if built_for in ("cpu", "hip") or shutil.which("nvidia-smi") is None:
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None
    return min(_nvidia_gpus(), key=lambda gpu: gpu.capability or BFLOAT16_SINCE, default=None)


def torch_build() -> str:
    """`cuda`, `hip` or `cpu`: what the installed torch was built for, by its version file; `unknown` if there is
    none.
    """
    found = find_spec("torch")  # of a top-level package: finds the file, runs nothing of it
    if found is None or found.origin is None:
        return "unknown"
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    for build in ("cuda", "hip"):
        if re.search(rf"^{build}\b[^=\n]*=\s*['\"]", text, re.MULTILINE):
            return build
    return "cpu"


def _nvidia_gpus() -> list[Gpu]:
    for query in QUERIES:
        argv = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(argv, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if answer.returncode == 0:
            return [gpu_of(line) for line in answer.stdout.splitlines() if line.strip()]
    return []


def gpu_of(line: str) -> Gpu:
    """A GPU from a line of nvidia-smi, `9.0, NVIDIA H200`."""
    number, _, name = line.partition(",")
    found = re.fullmatch(r"(\d+)\.(\d+)", number.strip())
    return Gpu(name=name.strip() or "the GPU", capability=None if found is None else (int(found[1]), int(found[2])))

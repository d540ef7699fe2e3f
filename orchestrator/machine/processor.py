"""This machine's processor, and whether it computes bfloat16 itself; must not import torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NATIVE_FLAGS = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""Names in /proc/cpuinfo of instructions that multiply bfloat16: two of x86, two of Arm."""
BELOW_BFLOAT16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN uses none of these instructions (oneDNN's cpu_isa_traits)."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What decides how fast a processor multiplies matrices."""

    name: str
    flags: frozenset[str]
    onednn_limit: str
    """ONEDNN_MAX_CPU_ISA, in lower case as oneDNN reads it; empty if there is no limit."""
    aten_limit: str
    """ATEN_CPU_CAPABILITY: limits torch's own kernels, which multiply no large matrices."""

    @property
    def has_native_bfloat16(self) -> bool:
        """Whether matrix products run in bfloat16 instructions.

        `torch.ops.mkldnn._is_mkldnn_bf16_supported()` asks for less: it is true on every AVX-512 processor, where oneDNN
        converts each operand to fp32 and back.
        """
        return bool(self.native_flags) and self.onednn_limit not in BELOW_BFLOAT16

    @property
    def native_flags(self) -> list[str]:
        return [flag for flag in NATIVE_FLAGS if flag in self.flags]

    def bfloat16_reason(self) -> str:
        """Why bfloat16 is or is not native here."""
        if not self.native_flags:
            return f"{self.name} has no bfloat16 instructions"
        if not self.has_native_bfloat16:
            return f"ONEDNN_MAX_CPU_ISA={self.onednn_limit.upper()} keeps {self.name} from its bfloat16 instructions"
        return f"{self.name} computes bfloat16 natively ({', '.join(self.native_flags)})"


def this_processor(environment: Mapping[str, str] | None = None, cpuinfo: Path = CPUINFO) -> Processor:
    """The processor of this machine, under the limits that the environment sets; without flags if /proc is missing."""
    environment = os.environ if environment is None else environment
    facts = _first_core(cpuinfo)
    # x86 calls its list `flags`, Arm `Features`; Arm names its cores by number, so the architecture has to suffice
    flags = facts.get("flags") or facts.get("Features") or ""
    return Processor(
        name=facts.get("model name") or platform.processor() or platform.machine() or "this processor",
        flags=frozenset(flags.split()),
        onednn_limit=(environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "").lower(),
        aten_limit=environment.get("ATEN_CPU_CAPABILITY", "").lower(),
    )


def _first_core(cpuinfo: Path) -> dict[str, str]:
    """The facts of the first core; all cores of one machine are assumed equal."""
    try:
        first, _, _ = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    except OSError:
        return {}
    pairs = [line.partition(":") for line in first.splitlines()]
    return {key.strip(): value.strip() for key, _, value in pairs}

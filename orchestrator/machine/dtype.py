"""What `model.dtype=auto` means on the device of a run, and why; must not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.autos import AUTO
from orchestrator.config.autos import NUMBER_TYPE as KEY
from orchestrator.config.cluster import HardwareConfig
from orchestrator.config.run import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.files.atomic import read_json
from orchestrator.machine.this_machine import Machine, device_of, is_here
from orchestrator.run_folder.folder import RunFolder

Name = Literal["float32", "bfloat16"]
CHOICES = (AUTO, "float32", "bfloat16")
SHORT_NAMES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}
HALF_NAMES = ("float16", "fp16", "half", "16")


@dataclass(frozen=True, kw_only=True)
class NumberType:
    """The resolved `model.dtype` of a run."""

    name: Name
    is_auto: bool
    reason: str
    warning: str | None = None
    """Why this type is a poor choice on the present device."""


AS_CONFIGURED = NumberType(name="float32", is_auto=False, reason="as configured")


def settle(config: RunConfig, machine: Machine, *, is_auto: bool) -> NumberType:
    """The type of a composed configuration; an existing run folder keeps its original type."""
    frozen = _frozen(RunFolder(Path(config.output_dir).expanduser() / config.name)) if is_auto else None
    if frozen is not None:
        return settled_before(config, machine, *frozen)
    name, reason = choose(config, machine)
    if is_auto:
        return NumberType(name=name, is_auto=True, reason=reason)
    return explicit(config, machine)


def settle_folder(config: RunConfig, folder: RunFolder, machine: Machine) -> NumberType:
    """The type of the frozen configuration of a run folder."""
    frozen = _frozen(folder)
    if frozen is None or frozen[1] is None:
        return explicit(config, machine)
    return settled_before(config, machine, *frozen)


def settled_before(config: RunConfig, machine: Machine, name: Name, reason: str | None) -> NumberType:
    """A frozen type is kept, since another one would change the result; a note says so if it was chosen for another
    device.
    """
    best, why = choose(config, machine)
    kept = NumberType(name=name, is_auto=reason is not None, reason=reason or "as the run folder has it")
    return kept if name == best else replace(kept, warning=moved_sentence(name, kept.reason, best, why))


def moved_sentence(name: str, reason: str, best: str, why: str) -> str:
    """Why a run begun on another kind of device keeps its type."""
    return (
        f"model.dtype stays {name}, chosen where the run began ({reason}); on this device auto would choose {best}: {why}. "
        "A run keeps its type, because another one would change the result; start a run with another name= to use it"
    )


def explicit(config: RunConfig, machine: Machine) -> NumberType:
    """A typed value is used; with a warning if the device emulates it."""
    name = config.model.dtype
    best, why = choose(config, machine)
    is_emulated = name == "bfloat16" and best == "float32"
    warning = f"{emulated_words(why)}; type model.dtype=auto" if is_emulated else None
    return NumberType(name=name, is_auto=False, reason=AS_CONFIGURED.reason, warning=warning)


def emulated_words(why: str) -> str:
    return f"model.dtype=bfloat16 is emulated and slow: {why}"


def factor_words(slowdown: float) -> str:
    """What an emulated type costs: `; measured here, matrix products take 7.6x as long as in float32`."""
    return f"; measured here, matrix products take {slowdown:.2g}x as long as in float32"


def with_slowdown(number_type: NumberType, slowdowns: Iterable[float | None]) -> NumberType:
    """The warning with the largest measured factor; unchanged if nothing measured one."""
    known = [slowdown for slowdown in slowdowns if slowdown is not None]
    if number_type.warning is None or not known:
        return number_type
    return replace(number_type, warning=f"{number_type.warning}{factor_words(max(known))}")


def choose(config: RunConfig, machine: Machine) -> tuple[Name, str]:
    """bfloat16 if the ranks' device computes it natively, else float32; with the reason."""
    cluster, device = config.cluster, device_of(config, machine)
    known = cluster.hardware.native_bfloat16
    if known is not None:
        return _from_file(cluster.hardware, known)
    if is_here(config):
        found = machine.gpu if device == "cuda" else machine.processor
        if found is not None:
            return ("bfloat16" if found.has_native_bfloat16 else "float32"), found.bfloat16_reason()
    if device == "cpu":
        return "float32", (
            "the processors of the nodes are not known; set cluster.hardware.native_bfloat16=true where they have AVX512_BF16 or AMX"
        )
    return (
        "bfloat16",
        "the ranks' GPU is not known and is assumed to have compute capability 8.0 or later; the ranks check it",
    )


def dtype_problem(value: object) -> str | None:
    """Why a value of `model.dtype` cannot be used; None if it can."""
    if value in CHOICES:
        return None
    typed = str(value).lower()
    if typed in HALF_NAMES:
        return f"{KEY}: {value} is not supported yet; type {KEY}=auto, float32 or bfloat16"
    hint = f"; did you mean {KEY}={SHORT_NAMES[typed]}?" if typed in SHORT_NAMES else ""
    return f"{KEY}: {value} is not one of {', '.join(CHOICES)}{hint}"


def frozen_reason(record: Any) -> str | None:
    """The reason in a run.json; None if the type was typed, or an older version wrote the file."""
    chosen = record.get("auto", {}) if isinstance(record, dict) else {}  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return chosen.get(KEY) if isinstance(chosen, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _frozen(folder: RunFolder) -> tuple[Name, str | None] | None:
    """(type, reason) of a run folder; None if there is no run yet, or an unreadable one, which freezing will report."""
    try:
        record: Any = read_json(folder.run)
        name: Name = record["config"]["model"]["dtype"]
    except (RunFolderError, KeyError, TypeError):
        return None
    return name, frozen_reason(record)


def _from_file(hardware: HardwareConfig, is_native: bool) -> tuple[Name, str]:
    if is_native:
        return "bfloat16", f"{hardware.name} computes bfloat16 natively (hardware file)"
    return "float32", (
        f"{hardware.name} does not compute bfloat16 natively (hardware file); float16 is not supported yet"
    )

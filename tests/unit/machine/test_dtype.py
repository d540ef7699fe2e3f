"""What model.dtype=auto takes on each kind of hardware, what a run folder keeps, and what is reported; no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import Asker

from orchestrator.composition.compose import CONF, compose, examine
from orchestrator.config.cluster import HardwareConfig
from orchestrator.files.atomic import read_json, write_json
from orchestrator.machine.accelerators import Gpu, gpu_of, torch_build
from orchestrator.machine.dtype import choose, settle, settle_folder
from orchestrator.machine.processor import Processor, this_processor
from orchestrator.machine.this_machine import Machine, device_of, this_machine, with_device
from orchestrator.run_folder.folder import RunFolder

LORA = "+experiment=llama_lora"
CPUINFO = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: {name}\nflags\t\t: fpu avx2 {flags}\n\nprocessor\t: 1\n"
)
OLD = Processor(name="AMD EPYC", flags=frozenset({"avx2"}), onednn_limit="", aten_limit="")
NEW = Processor(name="Xeon", flags=frozenset({"avx2", "avx512_bf16"}), onednn_limit="", aten_limit="")
V100, H200 = Gpu(name="Tesla V100", capability=(7, 0)), Gpu(name="NVIDIA H200", capability=(9, 0))
FLOAT16 = "float16 is not supported yet"


def processor_of(folder: Path, flags: str, environment: dict[str, str]) -> Processor:
    file = folder / "cpuinfo"
    file.write_text(CPUINFO.format(name="Some CPU", flags=flags))
    return this_processor(environment, file)


# ---- processors and GPUs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "limit", "is_native", "reason"),
    [
        ("", "", False, "Some CPU has no bfloat16 instructions"),
        ("avx512f avx512_vnni", "", False, "Some CPU has no bfloat16 instructions"),
        ("avx512f avx512_bf16", "", True, "Some CPU computes bfloat16 natively (avx512_bf16)"),
        ("amx_bf16 avx512_bf16", "ALL", True, "Some CPU computes bfloat16 natively (amx_bf16, avx512_bf16)"),
        ("amx_bf16 avx512_bf16", "avx512_core_bf16", True, "Some CPU computes bfloat16 natively (amx_bf16, avx512_bf16)"),
        ("amx_bf16 avx512_bf16", "AVX2", False, "ONEDNN_MAX_CPU_ISA=AVX2 keeps Some CPU from its bfloat16 instructions"),
        ("avx512_bf16", "AVX512_CORE", False, "ONEDNN_MAX_CPU_ISA=AVX512_CORE keeps Some CPU from its bfloat16 instructions"),
    ],
)  # fmt: skip
def test_a_processor_counts_as_native_by_its_instructions_and_onednns_limit(
    tmp_path: Path, flags: str, limit: str, is_native: bool, reason: str
) -> None:
    processor = processor_of(tmp_path, flags, {"ONEDNN_MAX_CPU_ISA": limit})
    assert (processor.has_native_bfloat16, processor.bfloat16_reason()) == (is_native, reason)


def test_arm_and_a_machine_without_proc_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimd bf16\nCPU part : 0xd40\n")
    assert this_processor({}, tmp_path / "arm").has_native_bfloat16
    assert not this_processor({}, tmp_path / "missing").has_native_bfloat16


def test_gpus_are_judged_by_their_compute_capability() -> None:
    assert gpu_of("9.0, NVIDIA H200") == H200 and H200.has_native_bfloat16
    assert gpu_of("00000000:01:00.0, Tesla K80") == Gpu(name="Tesla K80", capability=None)
    assert not V100.has_native_bfloat16 and FLOAT16 in V100.bfloat16_reason()


# ---- hardware files ------------------------------------------------------------------------------


def test_each_hardware_file_decides_for_itself_wherever_it_is_planned() -> None:
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (CONF / "hardware").glob("*.yaml")}
    config = compose([LORA, "launcher=slurm"])
    machines = [Machine(processor=cpu, gpu=gpu) for cpu in (OLD, NEW) for gpu in (None, V100, H200)]
    chosen: dict[str, set[str]] = {}
    for name, values in files.items():
        cluster = config.cluster.model_copy(update={"hardware": HardwareConfig.model_validate(values)})
        chosen[name] = {choose(config.model_copy(update={"cluster": cluster}), machine)[0] for machine in machines}
    assert len(files) >= 11
    assert chosen.pop("cpu") == chosen.pop("unknown") == {"float32"}
    assert all(found == {"bfloat16"} for found in chosen.values()), chosen


def test_ranks_on_this_machine_get_what_it_computes_and_ranks_elsewhere_never_do() -> None:
    here = compose([LORA, "launcher=local"])
    cases = {
        (OLD, None): ("float32", "AMD EPYC has no bfloat16 instructions"),
        (NEW, None): ("bfloat16", "Xeon computes bfloat16 natively (avx512_bf16)"),
        (OLD, H200): ("bfloat16", "NVIDIA H200 computes bfloat16 natively (compute capability 9.0)"),
        (NEW, V100): ("float32", V100.bfloat16_reason()),
    }
    for (cpu, gpu), expected in cases.items():
        assert choose(here, Machine(processor=cpu, gpu=gpu)) == expected
    on_cpu = compose([LORA, "launcher=local", "cluster.device=cpu"])
    assert choose(on_cpu, Machine(processor=NEW, gpu=V100))[0] == "bfloat16"
    for words in (
        ["launcher=slurm"],
        ["launcher=torchrun", "cluster.nodes=2", "cluster.device=cpu", "stages.sft.batch.micro_size=2"],
    ):
        name, reason = choose(compose([LORA, *words]), Machine(processor=NEW, gpu=None))
        assert name == "float32" and "cluster.hardware.native_bfloat16=true" in reason
    asked = compose([LORA, "launcher=slurm", "cluster.gpu_request=gres", "cluster.gpus_per_node=1"])
    assert choose(asked, Machine(processor=OLD, gpu=None))[0] == "bfloat16"
    refused = compose(
        [
            LORA,
            "launcher=slurm",
            "cluster=h100x8",
            "stages.sft.batch.global_size=32",
            "cluster.hardware.native_bfloat16=false",
        ]
    )
    assert choose(refused, Machine(processor=NEW, gpu=H200))[0] == "float32"


def test_a_device_that_is_known_takes_the_place_of_auto_in_the_arithmetic() -> None:
    config = compose([LORA, "launcher=local"])
    assert device_of(config, Machine(processor=OLD, gpu=None)) == "cpu"
    assert with_device(config, Machine(processor=OLD, gpu=H200)).cluster.device == "cuda"
    assert (
        device_of(
            compose([LORA, "cluster=h100x8", "stages.sft.batch.global_size=32"]), Machine(processor=OLD, gpu=None)
        )
        == "cuda"
    )


@pytest.mark.skipif(this_machine().gpu is not None, reason="of a machine without a GPU")
def test_the_plan_of_a_machine_without_a_gpu_speaks_of_none(ask: Asker) -> None:
    answer = ask("plan", LORA, "launcher=local")
    assert "CUDA" not in answer.out and "cuda" not in answer.out and "context" not in answer.out
    assert torch_build() in ("cpu", "cuda", "hip")


# ---- the type of a run ---------------------------------------------------------------------------


def test_every_preset_leaves_the_type_to_the_device() -> None:
    for file in (CONF / "model").glob("*.yaml"):
        composed = examine([LORA, f"model={file.stem}", "launcher=slurm", "hardware@cluster.hardware=h100"])
        assert composed.number_type.is_auto and composed.config.model.dtype == "bfloat16", file


def test_what_is_typed_is_obeyed_and_emulation_is_warned_of() -> None:
    config, machine = compose([LORA, "launcher=local", "model.dtype=bfloat16"]), Machine(processor=OLD, gpu=None)
    found = settle(config, machine, is_auto=False)
    assert (found.name, found.is_auto) == ("bfloat16", False)
    assert (
        found.warning
        == "model.dtype=bfloat16 is emulated and slow: AMD EPYC has no bfloat16 instructions; type model.dtype=auto"
    )
    assert settle(config, Machine(processor=NEW, gpu=None), is_auto=False).warning is None
    plain = compose([LORA, "launcher=local", "model.dtype=float32"])
    assert settle(plain, Machine(processor=NEW, gpu=None), is_auto=False).warning is None


def test_a_run_folder_keeps_its_type_and_another_kind_of_device_is_reported(tmp_path: Path) -> None:
    config = compose([LORA, "launcher=local", f"output_dir={tmp_path}", "name=kept", "model.dtype=bfloat16"])
    folder = RunFolder(tmp_path / "kept")
    record = {"config": config.model_dump(mode="json"), "auto": {"model.dtype": NEW.bfloat16_reason()}}
    write_json(folder.run, record)
    for found in (
        settle(config, Machine(processor=OLD, gpu=None), is_auto=True),
        settle_folder(config, folder, Machine(processor=OLD, gpu=None)),
    ):
        assert (found.name, found.reason) == ("bfloat16", "Xeon computes bfloat16 natively (avx512_bf16)")
        assert (
            found.warning is not None and "on this device auto would choose float32: AMD EPYC has no" in found.warning
        )
    assert settle_folder(config, folder, Machine(processor=OLD, gpu=H200)).warning is None


def test_a_folder_of_an_older_version_goes_on(tmp_path: Path) -> None:
    config = compose([LORA, "launcher=local", f"output_dir={tmp_path}", "name=old", "model.dtype=bfloat16"])
    plain = config.model_dump(mode="json")
    del plain["cluster"]["hardware"]["native_bfloat16"]
    folder = RunFolder(tmp_path / "old")
    write_json(folder.run, {"orchestrator": "0.1", "config": plain})
    assert type(config).model_validate(plain, strict=False) == config
    found = settle(config, Machine(processor=OLD, gpu=None), is_auto=True)
    assert (found.name, found.is_auto) == ("bfloat16", False)
    composed = examine([LORA, f"output_dir={tmp_path}", "name=old", "launcher=slurm"])
    assert composed.config.model.dtype == "bfloat16"


def test_the_two_variables_that_play_an_old_processor_decide_and_the_folder_keeps_it(tmp_path: Path) -> None:
    """A process of its own under the variables: planned, frozen with its reason, and rendered again without them."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    words = [LORA, "launcher=local", "cluster.device=cpu", "tracking=none", "name=kept", f"output_dir={tmp_path}"]
    argv = [sys.executable, "-m", "orchestrator", "render", *words]
    environment = {**os.environ, "ORCHESTRATOR_CACHE": str(tmp_path / "cache")}
    for extra in (limits, {}):
        ended = subprocess.run(argv, cwd=tmp_path, env={**environment, **extra}, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    record, planned = read_json(RunFolder(tmp_path / "kept").run), read_json(RunFolder(tmp_path / "kept").plan)
    assert record["config"]["model"]["dtype"] == planned["dtype"] == "float32"
    assert (
        record["auto"]["model.dtype"] == planned["dtype_reason"] and "bfloat16 instructions" in planned["dtype_reason"]
    )


def test_values_that_are_no_type_say_what_to_type(ask: Asker) -> None:
    assert ask.refused("plan", LORA, "model.dtype=float16") == (
        "model.dtype: " + FLOAT16 + "; type model.dtype=auto, float32 or bfloat16",
    )
    assert ask.refused("plan", LORA, "model.dtype=bf16") == (
        "model.dtype: bf16 is not one of auto, float32, bfloat16; did you mean model.dtype=bfloat16?",
    )


def test_plan_and_json_tell_the_type_with_its_reason(ask: Asker) -> None:
    words = ("plan", LORA, "hardware@cluster.hardware=l40s")
    assert "bfloat16 (auto): l40s computes bfloat16 natively" in " ".join(ask(*words).out.split())
    planned = json.loads(ask(*words, "format=json").out)
    assert (planned["dtype"], planned["dtype_is_auto"]) == ("bfloat16", True)

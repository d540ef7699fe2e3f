"""Address space that merging a LoRA and cooking a soup need: `python benchmarks/merge_memory.py [--size full] [--limit-mib N]`.

Makes a random Llama (about 1 B parameters for the merge, three of 350 M for the soup; `--size small` is 1/10 of that), then
runs each job in a process whose address space is limited to its own after all imports plus the limit. Prints sizes, limit,
peak and seconds; a job that needs more dies of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEBIBYTE = 1 << 20
SIZES = {
    "full": {"merge": (2048, 8192, 16, 32_000), "soup": (1024, 4096, 20, 32_000)},
    "small": {"merge": (768, 2048, 16, 4_000), "soup": (512, 1536, 12, 4_000)},
}
"""Hidden size, inner width, layers, words."""
LIMITS = {"full": 1536, "small": 320}


def write_model(folder: Path, size: tuple[int, int, int, int], seed: int) -> int:
    """A random Llama in fp32, written tensor by tensor; return its bytes."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from orchestrator.tensors.writer import Entry, TensorFile, in_file_order

    hidden, inner, layers, words = size
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=words,
        dtype="float32",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    entries = [Entry.of(name, parameter.float()) for name, parameter in skeleton.named_parameters()]
    file = TensorFile(folder / "model.safetensors", entries, {"format": "pt"})
    draw = torch.Generator().manual_seed(seed)
    for entry in in_file_order(entries):
        file.append(entry.name, torch.randn(entry.shape, generator=draw) * 0.02)
    return file.close().bytes


def write_adapter(base: Path, folder: Path) -> None:
    """A LoRA of rank 16 on every linear layer of a model, with random factors."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from orchestrator.models.model_files import ModelFiles, without_memory

    skeleton = without_memory(ModelFiles(AutoModelForCausalLM, base, dtype=torch.float32).module, torch.float32)
    settings = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(skeleton, settings).save_pretrained(folder)


def work(job: str, folder: Path, limit: int) -> None:
    """Do a job in this process, in `limit` MiB above what it has now."""
    import torch

    from orchestrator.composition.compose import compose
    from orchestrator.distributed.runtime import start_single_runtime
    from orchestrator.merging.adapter_merge import write_merged
    from orchestrator.merging.blend_files import BlendFiles
    from orchestrator.merging.merge_source import DENSE, Source
    from orchestrator.models.artifact_stream import begin_folder, write_tensor_files
    from orchestrator.models.artifact_tensors import layout_of
    from orchestrator.run_state.artifact_kind import ArtifactKind

    tuning = "lora" if job == "merge" else "full"
    config = compose(["+experiment=llama_lora", "model.dtype=float32", f"tuning={tuning}", "cluster.device=cpu"])
    runtime = start_single_runtime(config, autocast=False)
    torch.set_num_threads(1)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + limit * MEBIBYTE,) * 2)
    started = time.perf_counter()
    with torch.no_grad():
        if job == "merge":
            source = Source(
                config=config, base_folder=folder / "merge", artifact=folder / "lora", kind=ArtifactKind.ADAPTER
            )
            write_merged(source, DENSE, folder / "merged", runtime)
        else:
            members = [folder / f"soup-{n}" for n in range(3)]
            files = BlendFiles.of_models(config, members[0], members[1:])
            files.weigh([1 / 3, 1 / 3])
            begin_folder(runtime, folder / "soup")
            parameters = files.parameters
            layout = layout_of(parameters.module, parameters.names, config)
            write_tensor_files(runtime, parameters, layout, folder / "soup", config.cluster, is_trained=False)
    peak = max(
        int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmPeak" in line
    )
    print(json.dumps({"seconds": time.perf_counter() - started, "above_mib": peak - before / MEBIBYTE}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--limit-mib", type=int, default=None)
    parser.add_argument("--job", choices=["merge", "soup"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    limit = options.limit_mib or LIMITS[options.size]
    if options.job:
        work(options.job, options.folder, limit)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, sizes = Path(name), SIZES[options.size]
        bytes_of = {"merge": write_model(folder / "merge", sizes["merge"], 0)}
        write_adapter(folder / "merge", folder / "lora")
        bytes_of["soup"] = sum(write_model(folder / f"soup-{n}", sizes["soup"], n) for n in range(3))
        for job in ("merge", "soup"):
            argv = [sys.executable, __file__, "--size", options.size, "--job", job, "--folder", name]
            done = subprocess.run([*argv, "--limit-mib", str(limit)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{job}: died in {limit} MiB: {done.stderr[-1500:]}")
            told = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{job}: {bytes_of[job] / MEBIBYTE:,.0f} MiB of models in {limit:,} MiB above the imports; "
                f"peak {told['above_mib']:,.0f} MiB, {told['seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()

"""Plan beside real on one GPU: memory, tokens a second and MFU of an 8B-shaped model with random weights, through the whole command.

    python benchmarks/gpu.py [--tiny] [--lengths 2048,4096,8192,16384] [--steps 6] [--only methods|switches]

Cells: full, LoRA and QLoRA, with and without checkpointing, at every length; then LoRA at `--switch-length` tokens with one switch
changed at a time. About 2 minutes a cell on one H200. Each is a run of its own, with loading, evaluation, a save and the proof. The forecast is compared without what torch's allocator cannot see (context, communication) and without slack. A cell
that runs out of memory must have been NO or TIGHT in the plan. `--tiny` takes a model of two small layers, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import tiny_model

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import last_attempt_rows, read_rows
from orchestrator.run_folder.folder import RunFolder

METHODS = {
    "full": ("tuning=full", "optimizer@stages.sft.optimizer=adamw_8bit"),
    "lora": ("tuning=lora",),
    "qlora": ("tuning=lora", "quantization=nf4"),
}
SWITCHES = {
    "as it is": (),
    "packed documents of a quarter": ("packed",),
    "compiled layers": ("model.compile=true",),
    "compiled layers, packed": ("packed", "model.compile=true"),
    "loss head in plain torch": ("model.loss_head=torch",),
    "loss head of Liger": ("model.loss_head=liger",),
    "attention by sdpa, packed": ("packed", "model.attention=sdpa"),
    "all layers recomputed": ("model.gradient_checkpointing=true",),
    "one layer in two recomputed": ("model.gradient_checkpointing=true", "model.checkpoint_every=2"),
    "8-bit states": ("optimizer@stages.sft.optimizer=adamw_8bit",),
    "nf4 base": ("quantization=nf4",),
}
"""Words beside those of LoRA; `packed` stands for rows that hold four documents."""
UNSEEN = ("context", "communication", "slack")
"""Parts of the forecast that torch's allocator does not count."""
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TINY = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--switch-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", choices=("methods", "switches"))
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root / "model", TINY if options.tiny else LLAMA_8B)
        if options.only != "switches":
            wrong += methods(root, options)
        if options.only != "methods":
            wrong += switches(root, options)
    print(f"\n{wrong} cells were FIT in the plan and ran out of memory")
    return 1 if wrong else 0


def methods(root: Path, options: argparse.Namespace) -> int:
    head("method | checkpointing | tokens")
    wrong = 0
    for method, words in METHODS.items():
        for checkpointing, told in (("false", "off"), ("true", "on")):
            for length in (int(text) for text in options.lengths.split(",")):
                more = (*words, f"model.gradient_checkpointing={checkpointing}", *hardware_words(options.tiny))
                start = f"{method} | {told} | {length:,}"
                wrong += cell(
                    root, f"{method}-{checkpointing}-{length}", start, more, length=length, steps=options.steps
                )
    return wrong


def switches(root: Path, options: argparse.Namespace) -> int:
    """LoRA without checkpointing, and each switch on it."""
    head("LoRA with")
    wrong = 0
    for number, (name, words) in enumerate(SWITCHES.items()):
        length = options.switch_length
        parts = 4 if "packed" in words else 1
        more = (*METHODS["lora"], *(word for word in words if word != "packed"), *hardware_words(options.tiny))
        wrong += cell(root, f"switch-{number}", name, more, length=length, steps=options.steps, parts=parts)
    return wrong


def head(first: str) -> None:
    columns = f"{first} | plan | forecast GiB | real GiB | error | tokens/s | MFU"
    print(f"\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}", flush=True)


def cell(root: Path, name: str, start: str, words: tuple[str, ...], *, length: int, steps: int, parts: int = 1) -> bool:
    """Runs one cell, whose rows hold `parts` documents, and prints its row; whether the plan was wrong about it."""
    rows = root / f"rows-{length}-{parts}.jsonl"
    if not rows.exists():
        row = json.dumps({"instruction": "Say", "output": "a " * (length // 2 // parts - 16)})
        rows.write_text(f"{row}\n" * ((steps + 8) * parts), encoding="utf-8")
    argv = [sys.executable, "-m", "orchestrator", "run", "+experiment=llama_lora", f"name={name}", *words]
    argv += [
        f"output_dir={root / 'runs'}", f"model.base={root / 'model'}", "tracking=none", "launcher=local",
        f"stages.sft.data.train.path={rows}", "stages.sft.data.eval.path=none", f"stages.sft.data.max_length={length}",
        "stages.sft.data.truncation=accept", f"stages.sft.data.packing={'best_fit' if parts > 1 else 'none'}",
        f"stages.sft.max_steps={steps}", "stages.sft.batch.global_size=1", "stages.sft.batch.micro_size=1",
        "stages.sft.checkpoint.every_steps=null", "stages.sft.checkpoint.rehearse=false",
    ]  # fmt: skip
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    run = RunFolder(root / "runs" / name)
    if not run.plan.exists():
        print(f"| {start} | refused: {done.stderr.strip()[-160:]} | | | | | |", flush=True)
        return False
    memory: dict[str, Any] = read_json(run.plan)["stages"][0]["memory"]
    forecast = max(
        sum(size for part, size in phase["device"].items() if part not in UNSEEN) for phase in memory["phases"]
    )
    start = f"| {start} | {memory['verdict']} | {forecast:.2f} |"
    if done.returncode != 0:
        is_memory = "out of memory" in done.stdout + done.stderr
        print(f"{start} {'out of memory' if is_memory else done.stderr.strip()[-200:]} | | | |", flush=True)
        return is_memory and memory["verdict"] == "FIT"
    trained = [row for row in last_attempt_rows(read_rows(run.stage("sft").metrics)) if "loss" in row]
    real, rate, mfu = (trained[-1][key] for key in ("memory_gib", "tokens_per_second", "mfu"))
    error = forecast / float(str(real)) - 1
    print(f"{start} {float(str(real)):.2f} | {error:+.1%} | {float(str(rate)):,.0f} | {mfu} |", flush=True)
    return False


def hardware_words(is_tiny: bool) -> tuple[str, ...]:
    """The GPU that is here, for the plan's verdict and the MFU."""
    import torch

    if is_tiny or not torch.cuda.is_available():
        return ()
    facts = torch.cuda.get_device_properties(0)
    known = {"H200": "h200", "H100": "h100", "A100": "a100_80", "L40S": "l40s", "4090": "rtx4090", "B200": "b200"}
    name = next((preset for sign, preset in known.items() if sign in facts.name), "unknown")
    return (f"hardware@cluster.hardware={name}", f"cluster.hardware.memory_gib={facts.total_memory / 2**30:.1f}")


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """Random weights in bf16 as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        **shape, max_position_embeddings=32768, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    tiny_model.write_tokenizer(folder)


if __name__ == "__main__":
    sys.exit(main())

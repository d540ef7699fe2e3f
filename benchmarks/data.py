"""The data path in numbers: preparing against `datasets.map`, packing, a million rows, packed against padded training.

Run: python benchmarks/data.py prepare|packing|million|train|check [--file ROWS.jsonl --columns '{"instruction": "question", "output": "answer"}']
Every comparison is interleaved in one run; medians are told, with wall seconds and CPU seconds. On a busy machine
(/proc/pressure/cpu) no verdict is given: look at the CPU seconds, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.config.data import DataConfig
from orchestrator.data.order import BatchOrder
from orchestrator.data.preparation.packing import best_fit, efficiency, pack
from orchestrator.data.sources.validate import validate_rows
from orchestrator.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
BUSY_PERCENT = 10.0


def data_config(path: Path, columns: dict[str, str], **changes: Any) -> DataConfig:
    values: dict[str, Any] = yaml.safe_load((ROOT / "conf/data/base.yaml").read_text())
    values["train"] |= {"path": str(path), "columns": columns}
    values["eval"]["path"] = "none"
    return DataConfig.model_validate(values | changes)


def base_folder() -> Path:
    """SmolLM2-135M, dequantised once."""
    from orchestrator.composition.compose import examine
    from orchestrator.files.cache import cache_folder
    from orchestrator.models.loading import fetch_base

    config = examine(["+experiment=llama_lora"]).config
    return fetch_base(config.model, cache=cache_folder(None), say=print)


def pressure() -> float:
    """Percent of the last ten seconds in which some process waited for a core."""
    try:
        return float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 0.0


def settled_pressure(seconds: float = 30.0) -> float:
    """The pressure, once that of a run before has died away, or after so many seconds."""
    until = time.monotonic() + seconds
    while (busy := pressure()) > BUSY_PERCENT / 4 and time.monotonic() < until:
        time.sleep(1.0)
    return busy


def cpu_seconds() -> float:
    """CPU seconds of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """(units per wall second, units per CPU second) of work that answers its number of units."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    units = work()
    return units / (time.perf_counter() - wall), units / (cpu_seconds() - cpu)


def compare(ways: dict[str, Callable[[], int]], *, rounds: int, unit: str, reference: str) -> None:
    """Interleaved rounds of every way; medians and ratios to one of them."""
    busy = pressure()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(timed(work))
    medians = {
        name: tuple(statistics.median(column) for column in zip(*values, strict=True)) for name, values in found.items()
    }
    base = medians[reference]
    print(f"{'way':<34} {unit + '/s':>12} {'ratio':>6}   {unit + '/CPU s':>14} {'ratio':>6}   spread")
    for name, (wall, cpu) in medians.items():
        walls = [value for value, _ in found[name]]
        spread = (max(walls) - min(walls)) / wall
        print(f"{name:<34} {wall:12,.0f} {wall / base[0]:6.2f}   {cpu:14,.0f} {cpu / base[1]:6.2f}   {spread:.0%}")
    print(f"cores {os.cpu_count()}; waiting for a core before the start: {busy:.0f} % of the time")
    if busy > BUSY_PERCENT:
        print("the machine was busy: no verdict on wall seconds")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Rows to prepare, and what with."""

    path: Path
    columns: dict[str, str]
    tokenizer_folder: Path
    tokenizer: Any
    scratch: Path

    @property
    def fields(self) -> tuple[str, str]:
        return self.columns.get("instruction", "instruction"), self.columns.get("output", "output")

    def rows(self) -> Any:
        import datasets

        cache = str(self.scratch / "datasets")
        return datasets.load_dataset("json", data_files=str(self.path), split="train", cache_dir=cache)


def bench_prepare(path: Path, columns: dict[str, str], rounds: int) -> None:
    """Rows/s of preparing (chat template, labels, packing, on disk) against plain `datasets.map` doing less."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    folder = base_folder()
    work = Work(
        path=path,
        columns=columns,
        tokenizer_folder=folder,
        tokenizer=AutoTokenizer.from_pretrained(str(folder)),
        scratch=Path(tempfile.mkdtemp(prefix="data-benchmark-")),
    )
    ways: dict[str, Callable[[], int]] = {
        "ours: labels, packed, on disk": lambda: prepared_anew(work),
        "datasets.map, a row at a time": lambda: mapped_by_row(work),
        "datasets.map, batched": lambda: mapped_in_batches(work, labels=True),
        "datasets.map, batched, no labels": lambda: mapped_in_batches(work, labels=False),
    }
    compare(ways, rounds=rounds, unit="rows", reference="datasets.map, a row at a time")
    started = time.perf_counter()
    prepared(work, say=print)
    print(f"a hit: {1000 * (time.perf_counter() - started):.1f} ms")
    shutil.rmtree(work.scratch, ignore_errors=True)


def prepared(work: Work, *, say: Callable[[str], None]) -> Any:
    from orchestrator.data.preparation.prepare import ensure_prepared

    config = data_config(work.path, work.columns, packing="best_fit")
    return ensure_prepared(
        config, tokenizer_folder=work.tokenizer_folder, cache=work.scratch / "cache", seed=0, say=say
    )


def prepared_anew(work: Work) -> int:
    shutil.rmtree(work.scratch / "cache", ignore_errors=True)
    return prepared(work, say=lambda sentence: None).train_statistics.source_rows


def mapped_by_row(work: Work) -> int:
    """As TRL's tokenize: the conversation and its prompt, row by row."""
    (prompt, answer), template = work.fields, work.tokenizer.apply_chat_template

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        asked = [{"role": "user", "content": row[prompt]}]
        ids = template([*asked, {"role": "assistant", "content": row[answer]}], return_dict=True)["input_ids"]
        start = len(template(asked, add_generation_prompt=True, return_dict=True)["input_ids"])
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    rows = work.rows()
    return len(rows.map(encode, remove_columns=rows.column_names))


def mapped_in_batches(work: Work, *, labels: bool) -> int:
    """As fast as `map` goes: whole batches to the Rust tokenizer, which takes all cores."""
    (prompt, answer), tokenizer = work.fields, work.tokenizer

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        asked = [[{"role": "user", "content": text}] for text in rows[prompt]]
        chats = [[*one, {"role": "assistant", "content": text}] for one, text in zip(asked, rows[answer], strict=True)]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not labels:
            return {"input_ids": ids}
        prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        starts = [len(one) for one in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        trained = [[-100] * start + one[start:] for start, one in zip(starts, ids, strict=True)]
        return {"input_ids": ids, "labels": trained}

    rows = work.rows()
    return len(rows.map(encode, batched=True, remove_columns=rows.column_names))


def bench_packing(files: list[tuple[Path, dict[str, str]]]) -> None:
    """Efficiency on real lengths, and the time of a million lengths."""
    from orchestrator.data.preparation.prepare import ensure_prepared
    from orchestrator.data.prepared.folder import PreparedFolder

    folder = base_folder()
    scratch = Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    print(f"{'file':<32} {'rows':>6} {'mean':>6} {'capacity':>8} {'best fit':>9} {'packed':>8} {'possible':>9}")
    for path, columns in files:
        found = ensure_prepared(
            data_config(path, columns, max_length=2048),
            tokenizer_folder=folder,
            cache=scratch,
            seed=0,
            say=lambda sentence: None,
        )
        lengths = np.diff(PreparedFolder(found.train).document_offsets)
        for capacity in (1024, 2048):
            least = -(-int(lengths.sum()) // capacity)
            shares = [
                efficiency(lengths, rows, capacity)
                for rows in (len(best_fit(lengths, capacity)), len(pack(lengths, capacity)), least)
            ]
            print(
                f"{path.name:<32} {len(lengths):6} {lengths.mean():6.0f} {capacity:8} {shares[0]:9.4f} {shares[1]:8.4f} {shares[2]:9.4f}"
            )
    random = np.random.default_rng(0)
    million = {
        "log-normal": np.clip(random.lognormal(np.log(200), 0.8, 1_000_000), 1, 1024).astype(np.int64),
        "normal": np.clip(random.normal(217, 60, 1_000_000), 20, 1024).astype(np.int64),
        "uniform": random.integers(1, 1025, 1_000_000),
    }
    for name, lengths in million.items():
        for capacity in (1024, 2048, 8192):
            cpu = time.thread_time()
            rows = len(pack(lengths, capacity))
            print(
                f"a million {name} lengths to {capacity}: {time.thread_time() - cpu:.2f} CPU s, {efficiency(lengths, rows, capacity):.4f}"
            )
    shutil.rmtree(scratch, ignore_errors=True)


def bench_million() -> None:
    """A million conversations with one bad row in the middle: how soon it is refused, and with what words."""
    good = (
        json.dumps({"messages": [{"role": "user", "content": "q" * 120}, {"role": "assistant", "content": "a" * 120}]})
        + "\n"
    )
    bad = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ["a"]}]}) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "million.jsonl"
        with path.open("w") as file:
            for number in range(1_000_000):
                file.write(bad if number == 500_000 else good)
        print(f"{path.stat().st_size / 2**20:.0f} MiB")
        started, cpu = time.perf_counter(), time.process_time()
        try:
            validate_rows(data_config(path, {}).train)
        except DataError as error:
            print("\n".join(error.problems))
        print(f"{time.perf_counter() - started:.1f} s, {time.process_time() - cpu:.1f} CPU s")


def bench_check(path: Path, columns: dict[str, str]) -> None:
    """The look at a set of 100,000 rows after its first tokenisation."""
    from orchestrator.preflight.data_check import check_data

    folder, scratch = base_folder(), Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    rows = path.read_text().splitlines()
    big = scratch / "big.jsonl"
    big.write_text("\n".join((rows * (100_000 // len(rows) + 1))[:100_000]) + "\n")
    for name in ("first", "second"):
        started = time.perf_counter()
        report, _ = check_data(
            data_config(big, columns, packing="best_fit", overlap="accept"),
            tokenizer_folder=folder,
            cache=scratch,
            seed=0,
            epoch=None,
            say=print,
        )
        print(
            f"{name} check: {time.perf_counter() - started:.1f} s, {report.checked_rows} rows looked at, {len(report.faults)} faults"
        )
    shutil.rmtree(scratch, ignore_errors=True)


def bench_train(path: Path, columns: dict[str, str], rounds: int, length: int, tokens: int) -> None:
    """Trained tokens/s of LoRA on SmolLM2-135M, bf16: padded, grouped by length, packed with a dense mask, packed by document."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from orchestrator.data.preparation.prepare import ensure_prepared
    from orchestrator.dataloader.prepared_rows import PreparedRows
    from orchestrator.losses.token_cross_entropy import token_cross_entropy_sum
    from orchestrator.models import attention

    attention.register()
    folder, scratch = base_folder(), Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))

    def rows_of(**changes: Any) -> PreparedRows:
        config = data_config(path, columns, max_length=length, truncation="accept", **changes)
        found = ensure_prepared(config, tokenizer_folder=folder, cache=scratch, seed=0, say=lambda sentence: None)
        return PreparedRows.open(found.train)

    def way(implementation: str, *, group: bool = False, packing: str = "none") -> Callable[[], int]:
        rows = rows_of(packing=packing)
        order = BatchOrder(rows.rows, 8, 0, lengths=rows.lengths, group_by_length=group)
        steps = iter(range(1, 1_000_000))

        def work() -> int:
            model.set_attn_implementation(implementation)
            seen = learnt = 0
            while seen < tokens:
                indices = order.global_batch(next(steps))
                for micro in indices.reshape(-1, 1) if packing != "none" else [indices]:
                    batch = rows.batch(micro)
                    token_cross_entropy_sum(model(**batch.model_inputs()).logits, batch.labels_BT).backward()
                    seen += batch.num_tokens
                    learnt += batch.num_trained_tokens
                    if seen >= tokens:
                        break
            model.zero_grad()
            return learnt

        return work

    ways = {
        "padded, batches of 8": way("sdpa"),
        "grouped by length, batches of 8": way("sdpa", group=True),
        "packed, dense mask (sdpa)": way("sdpa", packing="best_fit"),
        "packed, by document": way(attention.DOCUMENTS, packing="best_fit"),
        "padded, by document": way(attention.DOCUMENTS),
    }
    for work in ways.values():
        work()
    print(f"{path.name}, rows of at most {length} tokens, {torch.get_num_threads()} threads")
    compare(ways, rounds=rounds, unit="trained", reference="padded, batches of 8")
    shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "packing", "million", "check", "train"))
    parser.add_argument("--file", type=Path, default=ROOT.parent / "shared/data/math/gsm8k_train.jsonl")
    parser.add_argument("--columns", type=json.loads, default={"instruction": "question", "output": "answer"})
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="real tokens of one measurement of `train`")
    options = parser.parse_args()
    match options.what:
        case "prepare":
            bench_prepare(options.file, options.columns, options.rounds)
        case "packing":
            lfs = ROOT.parent / "shared/data/sft/lfs_instruction_1100.jsonl"
            bench_packing([(lfs, {}), (options.file, options.columns)])
        case "million":
            bench_million()
        case "check":
            bench_check(options.file, options.columns)
        case "train":
            bench_train(options.file, options.columns, options.rounds, options.length, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())

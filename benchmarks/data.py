"""The data path in numbers: preparing against `datasets.map`, packing, a million rows, packed against padded training.

Run: python benchmarks/data.py prepare|packing|million|train|check [--file ROWS.jsonl --columns '{"instruction": "question", "output": "answer"}']
Every comparison is interleaved in one run; medians are printed, with wall seconds and CPU seconds. On a busy machine
(/proc/pressure/cpu) no verdict is given: look at the CPU seconds, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from inputs import ROOT, base_folder, data_config
from interleaving import compare
from packed_training import bench_train

from orchestrator.data.preparation.packing import best_fit, efficiency, pack
from orchestrator.data.sources.validate import validate_rows
from orchestrator.errors import DataError


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
        "ours: labels, packed, on disk": lambda: prepared_again(work),
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


def prepared_again(work: Work) -> int:
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

"""Padded, grouped and packed training of the same rows: the part `train` of benchmarks/data.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inputs import base_folder, data_config
from interleaving import compare

from orchestrator.data.order import BatchOrder


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

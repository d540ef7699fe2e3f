"""One contender of benchmarks/train.py in a process of its own: the same rows, LoRA and types in a plain torch loop, HF's Trainer, TRL.

    python benchmarks/peers.py NAME SPEC.json      prints one line of JSON: seconds and tokens of every step, peak memory, held-out loss

The rows were prepared by us and come in our order, so that equal steps hold equal tokens; TRL packs them by itself.
"""

from __future__ import annotations

import time

BEGAN = time.time()  # before the heavy imports: they are a part of the start

import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


@dataclass
class Clock:
    """Every step's seconds and tokens."""

    steps: list[dict[str, float]] = field(default_factory=list)
    first_step_seconds: float | None = None
    start: tuple[float, float] = (0.0, 0.0)
    seen: list[int] = field(default_factory=lambda: [0, 0])

    def begin(self) -> None:
        self.start, self.seen = (time.perf_counter(), time.process_time()), [0, 0]

    def saw(self, tokens: int, trained_tokens: int) -> None:
        self.seen = [self.seen[0] + tokens, self.seen[1] + trained_tokens]

    def end(self) -> None:
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.steps.append({"seconds": wall, "cpu_seconds": cpu, "tokens": self.seen[0], "trained_tokens": self.seen[1]})
        self.first_step_seconds = self.first_step_seconds or time.time() - BEGAN


def main() -> None:
    name, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    clock = Clock()
    model = {"raw": raw, "trainer": trainer, "trl": trl}[name.partition("_")[0]](name, spec, clock)
    print(
        json.dumps(
            {
                "steps": clock.steps,
                "first_step_seconds": clock.first_step_seconds,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "held_loss": held_out_loss(model, spec),
            }
        )
    )


def adapted(spec: dict[str, Any]) -> Any:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    return get_peft_model(base, adapter_settings(spec))


def adapter_settings(spec: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec["rank"],
        lora_alpha=2 * spec["rank"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )


def batches_of(name: str, spec: dict[str, Any]) -> list[Any]:
    """Our prepared rows in our order, one batch a step."""
    from orchestrator.data.order import BatchOrder
    from orchestrator.dataloader.prepared_rows import PreparedRows

    packed = name.endswith("packed")
    rows = PreparedRows.open(Path(spec["packed" if packed else "padded"]))
    size = spec["packed_rows"] if packed else spec["padded_rows"]
    order = BatchOrder(rows.rows, size, 0, lengths=rows.lengths, group_by_length=name.endswith("grouped"))
    return [rows.batch(order.global_batch(step)) for step in range(spec["steps"])]


def raw(name: str, spec: dict[str, Any], clock: Clock) -> Any:
    """transformers, PEFT and a loop: whole logits, sdpa; packed rows by restarting positions without a mask."""
    import torch

    model = adapted(spec)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0, fused=True)
    model.train()
    for batch in batches_of(name, spec):
        clock.begin()
        inputs = {"input_ids": batch.input_ids_BT, "use_cache": False}
        if name.endswith("packed"):
            inputs["position_ids"] = batch.model_inputs()["position_ids"]
        else:
            inputs["attention_mask"] = batch.attention_mask_BT
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), batch.labels_BT[:, 1:].flatten(), ignore_index=-100
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        clock.saw(batch.num_tokens, batch.num_trained_tokens)
        clock.end()
    return model


def timing(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    return Timing()


def arguments(kind: Any, spec: dict[str, Any], *, size: int, **changes: Any) -> Any:
    return kind(
        output_dir=spec["scratch"],
        max_steps=spec["steps"],
        per_device_train_batch_size=size,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **changes,
    )


def counted(base: Any, clock: Clock) -> Any:
    """The trainer with its rows in the order given, which counts the tokens that it computes losses of."""
    from torch.utils.data import SequentialSampler

    class Counted(base):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            mask_BT = inputs.get("attention_mask")
            tokens = int(mask_BT.sum()) if mask_BT is not None else inputs["input_ids"].numel()
            clock.saw(tokens, int((inputs["labels"] != -100).sum()))
            return super().compute_loss(model, inputs, *arguments, **options)

    return Counted


def rows_in_order(name: str, spec: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for batch in batches_of(name, spec):
        lengths = batch.attention_mask_BT.sum(1).tolist()
        for ids, labels, length in zip(batch.input_ids_BT.tolist(), batch.labels_BT.tolist(), lengths, strict=True):
            found.append({"input_ids": ids[:length], "labels": labels[:length]})
    return found


def trainer(name: str, spec: dict[str, Any], clock: Clock) -> Any:
    """transformers' Trainer over padded rows."""
    import datasets
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    own = counted(Trainer, clock)(
        model=adapted(spec),
        args=arguments(TrainingArguments, spec, size=spec["padded_rows"]),
        train_dataset=datasets.Dataset.from_list(rows_in_order(name, spec)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
        callbacks=[timing(clock)],
    )
    own.train()
    return own.model


def trl(name: str, spec: dict[str, Any], clock: Clock) -> Any:
    """TRL's SFTTrainer: its defaults (checkpointing on), or its packing."""
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    packs = name.endswith("packing")
    import torch

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    rows = rows_in_order("padded", {**spec, "steps": spec["all_steps"] if packs else spec["steps"]})
    masks = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in rows
    ]
    settings = {"packing": True, "packing_strategy": "bfd"} if packs else {}
    size = spec["packed_rows"] if packs else spec["padded_rows"]
    own = counted(SFTTrainer, clock)(
        model=base,
        args=arguments(SFTConfig, spec, size=size, max_length=spec["length"], completion_only_loss=True, **settings),
        train_dataset=datasets.Dataset.from_list(masks),
        peft_config=adapter_settings(spec),
        callbacks=[timing(clock)],
    )
    own.train()
    return own.model


def held_out_loss(model: Any, spec: dict[str, Any]) -> float:
    """Mean loss of the held-out answers, row by row, by plain transformers."""
    import torch

    from orchestrator.dataloader.prepared_rows import PreparedRows

    rows = PreparedRows.open(Path(spec["held"]))
    model.eval()
    total = count = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for index in range(min(rows.rows, spec["held_rows"])):
            batch = rows.batch([index])
            logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False).logits[:, :-1].float()
            labels_BT = batch.labels_BT[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="sum"
                )
            )
            count += float((labels_BT != -100).sum())
    return total / count


if __name__ == "__main__":
    main()

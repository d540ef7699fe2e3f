"""The script that somebody would write with torch, transformers and PEFT: the other side of benchmarks/command_time.py.

    python benchmarks/bare_script.py RUN/run.json      one line of JSON: when each phase ended, and its rates

Rows, order, sizes and rates are read from a run of ours, and tokenised here by the base's own chat template. Nothing of the
orchestrator is imported. Packed runs are trained in padded batches of as many documents: packing is no part of a bare script.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

DOCUMENTS = 2
"""Of some 200 tokens in a packed row of 512."""


def main() -> None:
    run = Path(sys.argv[1])
    stage = json.loads(run.read_text())["config"]["stages"]["sft"]
    edges = [time.time()]
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((run.parent / "sft/result.json").read_text())["base"]["folder"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, held = (tokenised(tokenizer, path) for path in files_of(stage))
    edges.append(time.time())
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage["optimizer"]["lr"], weight_decay=0.0)
    edges.append(time.time())
    is_packed = stage["data"]["packing"] != "none"
    size, steps = stage["batch"]["micro_size"] * (DOCUMENTS if is_packed else 1), stage["max_steps"]
    evaluated(model, held, size)
    edges.append(time.time())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist() * 1000
    tokens, began = 0, 0.0
    model.train()
    for step in range(steps):
        rows = [train[index] for index in order[step * size : (step + 1) * size]]
        loss, _ = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            edges.append(time.time())
            began = time.perf_counter()
        else:
            tokens += sum(len(ids) for ids, _ in rows)
    rate = tokens / (time.perf_counter() - began)
    edges.append(time.time())
    held_loss = evaluated(model, held, size)
    edges.append(time.time())
    model.save_pretrained(run.parent / "script")
    held_rate = sum(len(ids) for ids, _ in held) / (edges[-1] - edges[-2])
    rates = {"tokens/s": rate, "held-out tokens/s": held_rate, "held-out loss": held_loss}
    print(json.dumps({"edges": edges, "rates": rates}))


def files_of(stage: dict[str, Any]) -> list[Path]:
    """Train and held-out rows; those of the demonstration lie in the package."""
    names = [stage["data"]["train"]["path"], stage["data"]["eval"]["path"]]
    shipped = Path(__file__).resolve().parent.parent / "orchestrator/demonstration"
    if names[0] == "demonstration":
        return [shipped / "train.jsonl", shipped / "held_out.jsonl"]
    return [Path(name) for name in names]


def tokenised(tokenizer: Any, path: Path) -> list[tuple[list[int], int]]:
    """(ids, where the answer begins) of every row."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        rows.append((tokenizer(whole)["input_ids"], len(tokenizer(asked)["input_ids"])))
    return rows


def loss_of(model: Any, rows: list[tuple[list[int], int]]) -> tuple[Any, int]:
    """(mean loss of the answers, their tokens) of a padded batch."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([[-100] * begin + ids[begin:] + [-100] * (width - len(ids)) for ids, begin in rows])
    loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
    return loss, int((labels_BT[:, 1:] != -100).sum())


def evaluated(model: Any, rows: list[tuple[list[int], int]], size: int) -> float:
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(rows), size):
            loss, tokens = loss_of(model, rows[first : first + size])
            total, count = total + float(loss) * tokens, count + tokens
    return total / count


if __name__ == "__main__":
    main()

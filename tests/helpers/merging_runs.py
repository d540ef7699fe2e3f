"""Fixtures for tests of evaluation sets and blends: two small sets with two answers, and run overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import Bench


def write_answer_sets(folder: Path) -> None:
    """Write train.jsonl, inside.jsonl (same task) and outside.jsonl (other wording); the answer is yes or no."""
    for name, first, count, form in (
        ("train", 0, 64, "{} {}"),
        ("inside", 1000, 12, "{} {}"),
        ("outside", 2000, 12, "say {} or {}"),
    ):
        rows = [
            {
                "instruction": form.format("red" if number % 2 else "blue", number),
                "input": "",
                "output": "yes" if number % 2 else "no",
            }
            for number in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer_words(bench: Bench, name: str, *stages: str) -> list[str]:
    """The overrides of an fp32 run on these sets; every stage except the trained ones scores them."""
    words = [f"name={name}", f"output_dir={bench.runs}", f"model.base={bench.model}", "model.dtype=float32"]
    words += ["tracking=none", "launcher=local", f"pipeline=[{','.join(stages)}]"]
    for stage in stages:
        is_trained = stage in ("head", "sft", "other")
        words.append(f"stages.{stage}.data.train.path={bench.root / ('train' if is_trained else 'inside')}.jsonl")
        if is_trained:
            words += [f"stages.{stage}.data.eval.path=none", f"stages.{stage}.epochs=null"]
            words += [f"stages.{stage}.optimizer.lr=1e-2", f"stages.{stage}.checkpoint.rehearse=false"]
        else:
            words.append(f"stages.{stage}.sets={{outside: {{path: {bench.root}/outside.jsonl, shift: true}}}}")
    return words


@torch.no_grad()
def likeliest(model: torch.nn.Module, prompt: Sequence[int], options: Sequence[Sequence[int]]) -> list[float]:
    """log p of every option after a prompt, each by one plain forward pass over the whole sequence."""
    found: list[float] = []
    for option in options:
        ids_1T = torch.tensor([[*prompt, *option]])
        logprobs_1TV = model(input_ids=ids_1T, use_cache=False).logits.double().log_softmax(-1)
        places = range(len(prompt), ids_1T.shape[1])
        found.append(sum(float(logprobs_1TV[0, place - 1, ids_1T[0, place]]) for place in places))
    return found

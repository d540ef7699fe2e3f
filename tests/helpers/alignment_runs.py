"""Fixtures for tests of preference and policy stages: pairs, labelled rows, prompts, and run overrides."""

from __future__ import annotations

import json
from pathlib import Path

from bench import Bench
from tiny_model import WORDS

FUNCTION = '''"""A reward that a small model can climb: the share of its characters that are `a`."""


def letter_share(prompt: str, completion: str, row: dict) -> float:
    return completion.count("a") / max(1, len(completion))


def longer_is_better(prompt: str, completion: str, row: dict) -> float:
    return float(len(completion))
'''


def write_sets(folder: Path) -> None:
    """Write pairs.jsonl, feedback.jsonl, prompts.jsonl and rewards.py, with held-out files next to them."""
    for name, first, count in (("", 0, 24), ("_held_out", 1000, 6)):
        numbers = range(first, first + count)
        _write(folder / f"pairs{name}.jsonl", [_pair(number) for number in numbers])
        _write(folder / f"feedback{name}.jsonl", [_feedback(number) for number in numbers])
        _write(
            folder / f"prompts{name}.jsonl",
            [{"prompt": _question(number), "answer": str(number)} for number in numbers],
        )
    (folder / "rewards.py").write_text(FUNCTION, encoding="utf-8")


def words_of(bench: Bench, kind: str, name: str, *more: str) -> list[str]:
    """The overrides of a four-step fp32 run of one stage without a previous stage."""
    sets = {"reward": "pairs", "dpo": "pairs", "kto": "feedback", "grpo": "prompts"}
    stage = "dpo" if kind == "kto" else kind
    words = [
        "+experiment=llama_rlhf" if stage != "dpo" else "+experiment=llama_dpo",
        f"pipeline=[{stage}]",
        f"name={name}",
        f"output_dir={bench.runs}",
        f"model.base={bench.model}",
        "model.dtype=float32",
        "tracking=none",
        f"stages.{stage}.data.train.path={bench.root / sets[kind]}.jsonl",
        f"stages.{stage}.data.eval.path={bench.root / sets[kind]}_held_out.jsonl",
        f"stages.{stage}.epochs=null",
        f"stages.{stage}.max_steps=4",
        f"stages.{stage}.batch.global_size=8",
        f"stages.{stage}.batch.micro_size=2",
        f"stages.{stage}.optimizer.lr=1e-3",
    ]
    if kind == "kto":
        words.append("stages.dpo.loss=kto")
    if kind == "grpo":
        words += [
            "stages.grpo.rollout={prompts: 4, group_size: 4, max_new_tokens: 12, passes: 1}",
            f"stages.grpo.rewards=[{{source: '{bench.root}/rewards.py:letter_share', weight: 1.0, options: {{}}}}]",
        ]
    return [*words, *more]


def pipeline_words(bench: Bench, *more: str) -> list[str]:
    """The overrides of a whole fp32 pipeline with few steps."""
    pairs = "/pairs{}.jsonl"
    return [
        "+experiment=llama_rlhf",
        "name=pipeline",
        f"output_dir={bench.runs}",
        f"model.base={bench.model}",
        "model.dtype=float32",
        "tracking=none",
        "launcher=local",
        f"stages.sft.data.train.path={bench.root / 'rows.jsonl'}",
        f"stages.sft.data.eval.path={bench.root / 'held_out.jsonl'}",
        "stages.sft.max_steps=4",
        f"stages.reward.data.train.path={bench.root}{pairs.format('')}",
        f"stages.reward.data.eval.path={bench.root}{pairs.format('_held_out')}",
        "stages.reward.max_steps=4",
        f"stages.grpo.data.train.path={bench.root / 'prompts.jsonl'}",
        f"stages.grpo.data.eval.path={bench.root / 'prompts_held_out.jsonl'}",
        "stages.grpo.max_steps=2",
        "stages.grpo.accept_weak_reward=true",
        "stages.grpo.rollout={prompts: 4, group_size: 4, max_new_tokens: 12}",
        f"stages.evaluate.data.train.path={bench.root / 'held_out.jsonl'}",
        f"stages.merge.data.train.path={bench.root / 'held_out.jsonl'}",
        "stages.evaluate.rollout.max_new_tokens=12",
        *more,
    ]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _some(number: int) -> list[str]:
    return [WORDS[(number * 7 + step * 3) % len(WORDS)] for step in range(2 + number % 5)]


def _question(number: int) -> str:
    return f"Say {' '.join(_some(number))} ({number})"


def _pair(number: int) -> dict[str, object]:
    right = " ".join(_some(number))
    return {"instruction": _question(number), "chosen": right, "rejected": right[::-1], "margin": number % 3 / 3}


def _feedback(number: int) -> dict[str, object]:
    right = " ".join(_some(number))
    is_good = number % 2 == 0
    return {"prompt": _question(number), "completion": right if is_good else right[::-1], "label": is_good}

"""What the benchmarks of classifiers share: TREC's questions in small files, runs of the command line, accuracy by transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMON = (
    "launcher=local",
    "tracking=none",
    "checkpoint.every_steps=null",
    "checkpoint.rehearse=false",
    "checkpoint.probe_rows=0",
    "log_every_steps=10",
    "data.max_length=48",
    "data.overlap=accept",
    "batch.global_size=16",
    "batch.micro_size=16",
)
"""Keys below a stage, and keys of the whole run, for runs of a minute or two on one core."""
OF_THE_RUN = ("launcher", "tracking")


def write_first(source: Path, target: Path, rows: int) -> Path:
    """The first rows of a file of questions."""
    lines = source.read_text(encoding="utf-8").splitlines()[:rows]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def first_layers(folder: Path, layers: int) -> Path:
    """A base of the lowest layers of SmolLM2-135M as it ships with the package, so that nine runs take minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.composition.compose import compose
    from orchestrator.files.cache import cache_folder
    from orchestrator.models.loading import fetch_base

    if not folder.is_dir():
        whole = fetch_base(compose(["+experiment=llama_classify"]).model, cache=cache_folder(), say=print)
        model = AutoModelForCausalLM.from_pretrained(whole)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def words_of(stages: Sequence[str]) -> list[str]:
    """The common settings of a run with these stages."""
    own = [word for word in COMMON if word.split("=")[0] in OF_THE_RUN]
    return own + [f"stages.{stage}.{word}" for stage in stages for word in COMMON if word not in own]


def run(words: Sequence[str]) -> None:
    """Runs the command line; ends this program with its words where it fails."""
    done = subprocess.run([sys.executable, "-m", "orchestrator", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])


def result_of(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / stage / "result.json").read_text(encoding="utf-8"))


def opened(artifact: Path, base: Path) -> Any:
    """The classifier in fp32, as anybody would open it: a whole model, or an adapter on its base."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not (artifact / "adapter_config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(artifact).float().eval()
    settings = AutoConfig.from_pretrained(artifact)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=settings).float()
    return PeftModel.from_pretrained(model, artifact).float().eval()


def accuracy_by_transformers(artifact: Path, questions: Path, *, base: Path) -> float:
    """Share of questions that a folder's model and tokenizer get right."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = opened(artifact, base)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    right = 0
    for first in range(0, len(rows), 16):
        some = rows[first : first + 16]
        texts = [row["text"] for row in some]
        inputs = tokenizer(
            texts, padding=True, padding_side="right", truncation=True, max_length=48, return_tensors="pt"
        )
        with torch.no_grad():
            found = model(**inputs).logits.argmax(1).tolist()
        named = [model.config.id2label[number] for number in found]
        right += sum(name == str(row["label"]) for name, row in zip(named, some, strict=True))
    return right / len(rows)

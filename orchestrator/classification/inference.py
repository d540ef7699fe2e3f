"""Classifies texts with a trained classifier: what `generate` does for stages that make one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from orchestrator.classification.classes import Classes, read_classes
from orchestrator.classification.model import document_answers, open_classifier
from orchestrator.config.run import RunConfig
from orchestrator.data.encoding.labelled_text import encode_labelled
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.data.formats.examples import Labelled
from orchestrator.dataloader.batch import batch_of
from orchestrator.distributed.runtime import start_single_runtime
from orchestrator.errors import ConfigError
from orchestrator.metrics.phases import Phases
from orchestrator.models.loading import weights_dtype
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.held_out_rows import held_out_examples

SHOWN_CLASSES = 3


def classify_texts(
    config: RunConfig, folder: StageFolder, base_folder: Path, texts: Iterable[Labelled], *, phases: Phases
) -> int:
    """Print a line for each text: its likeliest classes with their probabilities, or its number."""
    runtime = start_single_runtime(config, autocast=config.model.dtype == "bfloat16")
    dtype = weights_dtype(config, uses_deepspeed=False)
    loaded = open_classifier(folder.artifact, config, base_folder=base_folder, weights_dtype=dtype, packed=False)
    model = loaded.to(runtime.device).eval()
    classes, facts = read_classes(folder.artifact), load_facts(base_folder)
    max_length = config.stages[folder.root.name].data.max_length
    count = 0
    phases.end()
    for text in texts:
        count += 1
        ids, _ = encode_labelled(text, facts, max_length)
        batch = batch_of([(np.array(ids), np.zeros(len(ids), dtype=np.bool_))], [0], pad_id=facts.pad_id)
        with torch.no_grad():
            logits_DC, _ = document_answers(runtime, model, batch.to(runtime.device))
        print(f"{describe(logits_DC[0].cpu(), classes)}  {text.text}{' | ' + text.pair if text.pair else ''}")
    if not count:
        raise ConfigError("no text: give --prompt TEXT, or one text per line on standard input")
    return 0


def describe(logits_C: torch.Tensor, classes: Classes) -> str:
    """The line for one text, such as `stop 0.93, fault 0.04, ...`."""
    if classes.problem == "regression":
        return f"{float(logits_C[0]):.4f}"
    chances_C = logits_C.softmax(0) if classes.problem == "single_label" else logits_C.sigmoid()
    best = chances_C.argsort(descending=True)[:SHOWN_CLASSES].tolist()
    return ", ".join(f"{classes.names[number]} {float(chances_C[number]):.2f}" for number in best)


def held_out_texts(config: RunConfig, run: RunFolder, stage: str, count: int) -> Iterator[Labelled]:
    """The first texts of the stage's held-out rows."""
    for example in held_out_examples(config, run, stage, count):
        (document,) = example.documents
        assert isinstance(document, Labelled)
        yield document

"""Merges an adapter into its base, measures the change, and writes a folder that anyone can load and publish."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from orchestrator.architecture.tokenizer_files import VOCABULARY_FILES
from orchestrator.dataloader.batch import Batch
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.files.atomic import publish, write_text
from orchestrator.files.manifest import FileDigest, write_manifest
from orchestrator.files.waiting import wait_for
from orchestrator.merging.comparison import Way, compare
from orchestrator.merging.merge_source import DEQUANTISED, Source
from orchestrator.merging.merged_parameters import MergedParameters
from orchestrator.models.artifact import COMPANIONS, open_artifact, open_model, write_model_settings
from orchestrator.models.artifact_stream import (
    ReadParameters,
    begin_folder,
    note_digests,
    noted_digests,
    write_tensor_files,
)
from orchestrator.models.artifact_tensors import whole_layout
from orchestrator.models.loading import DTYPES
from orchestrator.models.model_files import ModelFiles
from orchestrator.models.weight_stream import open_unfilled
from orchestrator.run_state.model_card import CARD
from orchestrator.tensors.writer import write_index

Say = Callable[[str], None]
READY = ".ready"
"""Says that rank 0 has completed a folder that is not published yet."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that was merged in one way and measured."""

    way: Way
    folder: Path
    hashed: Mapping[str, FileDigest]
    """Digests of its weights, on rank 0."""


def merge(source: Source, target: Path, runtime: Runtime, batches: list[Batch], *, say: Say) -> list[Candidate]:
    """Merge in every way into folders next to `target` and measure each; the best one, by its KL, comes first.

    Every rank must call it. At most the trained and one merged model are in memory, sharded where models are.
    """
    found: list[Candidate] = []
    trained = runtime.hold(_trained(source))
    for number, name in enumerate(source.ways):
        folder = target.with_name(f".{target.name}.way-{number}.partial")
        hashed = write_merged(source, name, folder, runtime)
        dtype = DTYPES[source.config.model.dtype]
        merged = runtime.hold(open_model(folder, source.config, dtype, packed=False))
        way = compare(name, runtime, trained, merged, batches)
        runtime.release(merged)
        found.append(Candidate(way=way, folder=folder, hashed=hashed))
        say(f"{name}: KL {way.kl:.2e} nats per token, same next token {way.agreement:.2%}")
    runtime.release(trained)
    return sorted(found, key=lambda one: (math.isnan(one.way.kl), one.way.kl))


def forget(candidates: list[Candidate]) -> None:
    """Remove the folders of candidates that are not published."""
    for one in candidates:
        shutil.rmtree(one.folder, ignore_errors=True)


def publish_merged(candidate: Candidate, target: Path, *, card: str, facts: Mapping[str, Any]) -> None:
    """Add card and manifest to a candidate, then rename its folder."""
    (candidate.folder / READY).unlink()
    write_text(candidate.folder / CARD, card)
    for file in candidate.folder.iterdir():
        file.chmod(0o644)
    write_manifest(candidate.folder, facts, hashed=candidate.hashed)
    publish(candidate.folder, target)


def write_merged(source: Source, way: str, folder: Path, runtime: Runtime) -> dict[str, FileDigest]:
    """Write model (in `model.dtype`), settings and tokenizer: a stream from file to file, a layer at a time.

    Every rank must call it and writes a share of the files. Return the digests of all on rank 0. CheckpointError if
    weights and tokenizer do not match, RunFolderError if the disk refuses.
    """
    begin_folder(runtime, folder)
    merged = _parameters(source, way)
    parameters = ReadParameters(module=merged.module, names=list(merged.shapes), read=merged.read)
    layout = whole_layout(merged.module, merged.shapes, source.config)
    try:
        digests = write_tensor_files(runtime, parameters, layout, folder, source.config.cluster, is_trained=False)
        note_digests(folder, digests)
        if not runtime.is_main:
            wait_for(folder / READY)
            return {}
        hashed = noted_digests(folder, layout)
        write_index(folder, layout.files, parameters=layout.parameters)
        _write_settings(source, merged, folder)
    except OrchestratorError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_text(folder / READY, "")
    return hashed


def _parameters(source: Source, way: str) -> MergedParameters | ModelFiles:
    if source.config.tuning.is_adapter:
        return MergedParameters(source, quantised=way == DEQUANTISED)
    return ModelFiles(AutoModelForCausalLM, source.artifact, dtype=DTYPES[source.config.model.dtype])


def _write_settings(source: Source, parameters: MergedParameters | ModelFiles, folder: Path) -> None:
    """Add settings and tokenizer. CheckpointError if they do not match the weights."""
    origin = source.base_folder if source.config.tuning.is_adapter else source.artifact
    module, *_ = open_unfilled(AutoModelForCausalLM, origin, dtype=DTYPES[source.config.model.dtype])
    write_model_settings(module, folder)
    for name in COMPANIONS:
        # Prefer the artifact's own files: its chat template is the one used in training.
        found = next((one / name for one in (source.artifact, source.base_folder) if (one / name).is_file()), None)
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
    problems = fit_problems(folder, module, is_tied=parameters.is_tied)
    if problems:
        raise CheckpointError(problems)


def fit_problems(folder: Path, model: Any, *, is_tied: bool) -> list[str]:
    """Inconsistencies between tokenizer, vocabulary and tied weights of a written folder."""
    problems: list[str] = []
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = folder / "tokenizer.json"
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        problems.append(f"{folder}: the base has no tokenizer to copy")
    elif tokenizer.is_file():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        ids = [token["id"] for token in content.get("added_tokens", [])]
        ids += list(content["model"]["vocab"].values()) if isinstance(content["model"].get("vocab"), dict) else []
        # Such a token would be an index error at the first user's prompt.
        if ids and max(ids) >= rows:
            problems.append(f"{folder}: the tokenizer knows the id {max(ids)}, the embedding has {rows} rows")
    if is_tied != bool(model.config.tie_word_embeddings):
        problems.append(
            f"{folder}: config.json says tie_word_embeddings={model.config.tie_word_embeddings}, the weights say {is_tied}"
        )
    return problems


def _trained(source: Source) -> torch.nn.Module:
    dtype = DTYPES[source.config.model.dtype]
    return open_artifact(
        source.artifact, base_folder=source.base_folder, config=source.config, weights_dtype=dtype
    ).eval()

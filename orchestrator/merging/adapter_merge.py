"""Merges an adapter into its base, measures the change, and writes a folder that anyone can load and publish."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional

from orchestrator.architecture.tokenizer_files import VOCABULARY_FILES
from orchestrator.config.model import NoQuantization
from orchestrator.config.run import RunConfig
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import publish, write_text
from orchestrator.files.manifest import write_manifest
from orchestrator.models.artifact import COMPANIONS, open_adapter, open_artifact
from orchestrator.models.loading import DTYPES, load_model
from orchestrator.models.weight_stream import HOST, placed_on
from orchestrator.run_state.artifact_kind import ArtifactKind

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A merge method and its measured effect."""

    name: str
    kl: float
    """Mean KL(trained || merged), in nats per token."""
    agreement: float
    """Share of the tokens for which both predict the same next token."""
    loss: float
    """Loss of the merged model on the trained tokens (on all, if none is trained)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is merged: an adapter with its base, or a full model that is only relocated."""

    config: RunConfig
    base_folder: Path
    artifact: Path
    kind: ArtifactKind


def merge(
    source: Source, rows: PreparedRows, runtime: Runtime, *, limit: int, micro_size: int, say: Say
) -> tuple[Any, Way, list[Way]]:
    """The merged model, how it was merged, and all measured methods; the one with the smallest KL is used."""
    batches = [
        rows.batch(list(range(first, min(first + micro_size, limit, rows.rows)))).to(runtime.device)
        for first in range(0, min(limit, rows.rows), micro_size)
    ]
    trained = _logits_of(_trained(source).to(runtime.device), batches, runtime)
    ways = {"dense base": _merged_dense}
    if source.config.quantization.is_4bit and source.kind is ArtifactKind.ADAPTER:
        ways["dequantised 4-bit base"] = _merged_dequantised
    measured: list[Way] = []
    for name, build in ways.items():
        model = build(source).to(runtime.device)
        measured.append(_compared(name, trained, _logits_of(model, batches, runtime), batches))
        say(f"{name}: KL {measured[-1].kl:.2e} nats per token, same next token {measured[-1].agreement:.2%}")
        # One model at a time: each is a whole copy in fp32.
        del model
        gc.collect()
    best = min(measured, key=lambda way: (math.isnan(way.kl), way.kl))
    return ways[best.name](source), best, measured


def write_merged(model: Any, folder: Path, *, source: Source, card: str, facts: Mapping[str, Any]) -> None:
    """Write model (in `model.dtype`), tokenizer and card, then rename. CheckpointError if they do not match."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.config.use_cache = True
    model.save_pretrained(temporary)
    for name in COMPANIONS:
        # Prefer the artifact's own files: its chat template is the one used in training.
        found = next(
            (folder / name for folder in (source.artifact, source.base_folder) if (folder / name).is_file()), None
        )
        if found is not None and not (temporary / name).exists():
            shutil.copyfile(found, temporary / name)
    problems = fit_problems(temporary, model)
    if problems:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(problems)
    write_text(temporary / "README.md", card)
    for file in temporary.iterdir():
        file.chmod(0o644)
    write_manifest(temporary, facts)
    publish(temporary, folder)


def fit_problems(folder: Path, model: Any) -> list[str]:
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
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    if is_tied != bool(model.config.tie_word_embeddings):
        problems.append(
            f"{folder}: config.json says tie_word_embeddings={model.config.tie_word_embeddings}, the weights say {is_tied}"
        )
    return problems


def _trained(source: Source) -> torch.nn.Module:
    return open_artifact(
        source.artifact,
        base_folder=source.base_folder,
        config=source.config,
        weights_dtype=DTYPES[source.config.model.dtype],
    ).eval()


def _merged_dense(source: Source) -> Any:
    """Merge into the published base; added in fp32 and rounded once."""
    dense = source.config.model_copy(update={"quantization": NoQuantization(scheme="none")})
    if not source.config.tuning.is_adapter:
        return open_artifact(
            source.artifact, base_folder=source.base_folder, config=dense, weights_dtype=DTYPES[dense.model.dtype]
        )
    with placed_on(HOST):
        return _with_adapter(load_model(source.base_folder, dense, weights_dtype=torch.float32), source)


def _merged_dequantised(source: Source) -> Any:
    """Merge into the weights seen in training: the dequantised 4-bit base."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn.modules import Linear4bit

    quantised = load_model(source.base_folder, source.config, weights_dtype=DTYPES[source.config.model.dtype])
    seen = {
        f"{name}.weight": bnb.dequantize_4bit(module.weight.data, cast("Any", module.weight).quant_state).float()
        for name, module in quantised.named_modules()
        if isinstance(module, Linear4bit)
    }
    del quantised
    dense = source.config.model_copy(update={"quantization": NoQuantization(scheme="none")})
    with placed_on(HOST):
        model = load_model(source.base_folder, dense, weights_dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for name, weight in seen.items():
        parameters[name].data.copy_(weight.reshape(parameters[name].shape))
    return _with_adapter(model, source)


def _with_adapter(base: Any, source: Source) -> Any:
    model: Any = open_adapter(base, source.artifact)
    # safe_merge: PEFT checks the product for NaN before it touches the base.
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.dtype = DTYPES[source.config.model.dtype]
    for parameter in merged.parameters():  # parameters only: rotary frequencies in 16 bits would change the model
        parameter.data = parameter.data.to(DTYPES[source.config.model.dtype])
    return merged.eval()


@torch.no_grad()
def _logits_of(model: torch.nn.Module, batches: Sequence[Batch], runtime: Runtime) -> list[torch.Tensor]:
    model.eval()
    found: list[torch.Tensor] = []
    for batch in batches:
        with runtime.forward_context():
            found.append(model(**batch.model_inputs()).logits.float().cpu())
        runtime.phases.advance(sum(map(len, found)), sum(len(one.input_ids_BT) for one in batches))
    return found


def _compared(
    name: str, trained: Sequence[torch.Tensor], merged: Sequence[torch.Tensor], batches: Sequence[Batch]
) -> Way:
    kl = same = loss = 0.0
    tokens = 0
    for one_BTV, other_BTV, batch in zip(trained, merged, batches, strict=True):
        spans = [(document.sequence, slice(document.start, document.stop - 1)) for document in batch.documents]
        one_KV = torch.cat([one_BTV[b, span] for b, span in spans]).log_softmax(-1)
        other_KV = torch.cat([other_BTV[b, span] for b, span in spans]).log_softmax(-1)
        next_K = torch.cat([batch.input_ids_BT.cpu()[b, span.start + 1 : span.stop + 1] for b, span in spans])
        kl += float(functional.kl_div(other_KV, one_KV, log_target=True, reduction="sum"))
        same += float((one_KV.argmax(-1) == other_KV.argmax(-1)).sum())
        loss += float(functional.nll_loss(other_KV, next_K, reduction="sum"))
        tokens += len(next_K)
    divergence = kl / tokens
    # Rounding may make it negative; NaN stays NaN, which no limit accepts.
    return Way(name=name, kl=0.0 if divergence < 0 else divergence, agreement=same / tokens, loss=loss / tokens)

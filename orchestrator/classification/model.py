"""Sequence-classification models: loaded with their classes, read at the right position, opened from an artifact.

Decoders are read at the last token of each document, wherever padding is; encoders by transformers' head, at their
token. B sequences of T positions, D documents, W hidden size, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from orchestrator.classification.classes import Classes, classes_of, read_classes, same_classes
from orchestrator.config.classification import ClassifyStage
from orchestrator.config.run import RunConfig
from orchestrator.data.encoding.labelled_text import separator_of
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError, DataError, ModelError
from orchestrator.models.causal_lm import NOT_FOR_A_BACKBONE
from orchestrator.models.loading import attention_of, disable_cpu_weight_repacking, nf4_settings
from orchestrator.models.tuning import apply_tuning, hold_masters_in_fp32, load_adapter
from orchestrator.models.weight_stream import load_streamed
from orchestrator.run_state.stage_context import StageContext

HEADS = ("score", "classifier", "pooler", "pre_classifier")
"""Modules never held in 4 bits, since they are new and trained."""


def build_classifier(context: StageContext, dtype: torch.dtype, packed: bool) -> torch.nn.Module:
    """The classifier to train: a new head on the base or on a policy, or the classifier of an earlier stage."""
    start = context.start
    goes_on = start is not None and start.kind.is_classifier
    classes = stage_classes(context)
    if goes_on and start is not None:
        same_classes(classes, read_classes(start.folder), stage=context.name, start=start.stage)
    folder = start.folder if start is not None and start.kind.is_whole_model else context.base_folder
    loaded = load_classifier(folder, context.config, classes, weights_dtype=dtype, packed=packed)
    model = apply_tuning(loaded, context.config, task="SEQ_CLS")
    if start is not None and start.kind.is_adapter:
        load_adapter(model, start.folder)
    hold_masters_in_fp32(model, context.config, dtype)
    return model


def stage_classes(context: StageContext) -> Classes:
    """The classes of a stage: from its own settings and rows, or from the classifier that it starts from."""
    stage = context.stage
    if isinstance(stage, ClassifyStage):
        return classes_of(stage, PreparedRows.open(context.train_data).meta, name=context.name)
    assert context.start is not None, "the pipeline's rules ask for a classifier before it"
    return read_classes(context.start.folder)


def load_classifier(
    folder: Path,
    config: RunConfig,
    classes: Classes,
    *,
    weights_dtype: torch.dtype,
    packed: bool,
    may_be_new: bool = True,
) -> PreTrainedModel:
    """The model of a folder with a head for these classes, newly initialised if the folder has none and `may_be_new`.

    ModelError if the architecture has no text classification head, or an encoder would get packed rows.
    """
    options: dict[str, Any] = {"dtype": weights_dtype, "attn_implementation": attention_of(config, packed=packed)}
    if config.quantization.is_4bit:
        options["quantization_config"] = nf4_settings(config, skip=HEADS)
    facts = load_facts(folder)
    try:
        settings: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, **classes.settings())
        if settings.get_text_config().pad_token_id is None:
            settings.pad_token_id = settings.get_text_config().pad_token_id = facts.pad_id
        model, report = load_streamed(AutoModelForSequenceClassification, folder, config=settings, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded as a classifier: {' '.join(str(error).split())[:300]}") from error
    lost = sorted(map(str, report["missing_keys"]))
    if lost and not may_be_new:
        raise CheckpointError(f"{folder}: no weights of {', '.join(lost[:5])}")
    if packed and not is_decoder(model):
        raise ModelError(
            f"{folder}: {type(model).__name__} is an encoder, in which packed texts would see each other; type packing=none"
        )
    disable_cpu_weight_repacking(model)
    return _answering_by_document(model, separator_of(facts))


def is_decoder(model: Any) -> bool:
    """Decoders call their classification head `score` and apply it to every token."""
    return hasattr(model, "score")


def _answering_by_document(model: Any, separator: int | None) -> PreTrainedModel:
    """Make the model answer `ends_D` with (logits_DC, features_DW); its class keeps its name for config.json.

    `ends_D` are the positions of the documents' last tokens in the flattened B x T tokens. Features are the last hidden
    state that the head reads: of a decoder's last token, of an encoder's first.
    """
    original = type(model)
    answer = _decoder_answer if is_decoder(model) else _encoder_answer
    separator = separator if getattr(model.config, "type_vocab_size", 1) > 1 else None

    def forward(self: Any, *arguments: Any, ends_D: torch.Tensor | None = None, **inputs: Any) -> Any:
        if ends_D is None:
            return original.forward(self, *arguments, **inputs)
        assert not arguments, "documents are answered by keywords alone"
        known = {name: value for name, value in inputs.items() if value is not None}
        return answer(self, original, ends_D, known, separator)

    model.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
    return model


def _decoder_answer(
    model: Any, _original: Any, ends_D: torch.Tensor, inputs: dict[str, Any], _separator: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a mask: no real token sees padding on the right, and every attention takes its fast path."""
    left_out = (*NOT_FOR_A_BACKBONE, "attention_mask")
    known = {name: value for name, value in inputs.items() if name not in left_out}
    hidden_BTW = getattr(model, model.base_model_prefix)(**known).last_hidden_state
    features_DW = hidden_BTW.flatten(0, 1).index_select(0, ends_D)
    return model.score(features_DW), features_DW


def _encoder_answer(
    model: Any, original: Any, ends_D: torch.Tensor, inputs: dict[str, Any], separator: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One document per sequence; what follows the first separator is the second text."""
    ids_BT = inputs["input_ids"]
    known = {"input_ids": ids_BT, "attention_mask": inputs.get("attention_mask")}
    if separator is not None:
        ends_BT = (ids_BT == separator).long()
        after_BT = (ends_BT.cumsum(1) - ends_BT).clamp(max=1)
        mask_BT = known["attention_mask"]
        known["token_type_ids"] = after_BT if mask_BT is None else after_BT * mask_BT
    out = original.forward(model, **known, output_hidden_states=True)
    rows_D = ends_D // ids_BT.shape[1]
    return out.logits.index_select(0, rows_D), out.hidden_states[-1][:, 0].index_select(0, rows_D)


def document_answers(runtime: Runtime, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits_DC, features_DW) of a batch's documents, fp32; part of the graph even if there is no document."""
    width = batch.input_ids_BT.shape[1]
    ends = [span.sequence * width + span.stop - 1 for span in batch.documents]
    ends_D = torch.tensor(ends, dtype=torch.int64, device=batch.input_ids_BT.device)
    mask = {} if batch.position_ids_BT is not None else {"attention_mask": batch.attention_mask_BT}
    with runtime.forward_context():
        logits_DC, features_DW = model(**batch.model_inputs(), **mask, ends_D=ends_D)
    return logits_DC.float(), features_DW.float()


def open_classifier(
    folder: Path, config: RunConfig, *, base_folder: Path, weights_dtype: torch.dtype, packed: bool
) -> torch.nn.Module:
    """A trained classifier as a user would load it, from disk alone; CheckpointError if weights are missing."""
    is_whole = not config.tuning.is_adapter
    model = load_classifier(
        folder if is_whole else base_folder,
        config,
        read_classes(folder),
        weights_dtype=weights_dtype,
        packed=packed,
        may_be_new=not is_whole,
    )
    if is_whole:
        return model
    from peft import PeftConfig, get_peft_model

    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    adapted = get_peft_model(model, settings)
    load_adapter(adapted, folder)
    return adapted


def refuse_other_rows(rows: PreparedRows, field: str) -> None:
    """Raise DataError if the rows of a configuration key have no labels."""
    if rows.meta.kind != "class":
        raise DataError(
            f"{field}: rows of format {rows.meta.format} have no classes; set their format=classification "
            "(fields text, label; columns names other columns)"
        )

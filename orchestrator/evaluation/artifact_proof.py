"""Scores an artifact in a fresh process, from its files alone: `python -m orchestrator.evaluation.artifact_proof`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from orchestrator.classification.classes import read_classes
from orchestrator.classification.model import open_classifier
from orchestrator.classification.objective import labelled_objective
from orchestrator.config.run import RunConfig, makes_classifier
from orchestrator.config.tuning import FreezeTuning
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.import_blocking import leave_out_unused
from orchestrator.distributed.runtime import start_single_runtime
from orchestrator.errors import EXIT_DO_NOT_RESTART, EXIT_DONE, CheckpointError, OrchestratorError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.manifest import read_manifest
from orchestrator.metrics.phases import Phases
from orchestrator.models.artifact import open_artifact, open_model
from orchestrator.models.loading import silence_libraries, weights_dtype
from orchestrator.models.tuning import cast_trained_to_fp32, freeze
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.frozen import load_config
from orchestrator.training.evaluation import evaluate
from orchestrator.training.objectives import proof_objective

LOSS_TOLERANCE = 1e-3


def prove(config: RunConfig, name: str, folder: StageFolder) -> float:
    """The held-out loss of a stage's reopened artifact; CheckpointError if it differs from the trainer's."""
    stage, is_classifier = config.stages[name], makes_classifier(config, name)
    expected: dict[str, Any] = read_json(folder.proof)
    # The bytes first: a damaged file would only show as another loss.
    read_manifest(folder.artifact)
    runtime = start_single_runtime(config, autocast=expected["autocast"], phases=Phases.joined(folder.phases))
    dtype = weights_dtype(config, uses_deepspeed=not expected["autocast"])
    rows = PreparedRows.open(Path(expected["data"]))
    if stage.makes == "merged model":
        model: torch.nn.Module = open_model(folder.artifact, config, dtype, packed=False).to(runtime.device)  # pyright: ignore[reportArgumentType]  # transformers' `to` is typed without self
    else:
        open_it = open_classifier if is_classifier else partial(open_artifact, scores=stage.makes == "reward model")
        model = open_it(
            folder.artifact,
            base_folder=Path(expected["base_folder"]),
            config=config,
            weights_dtype=dtype,
            packed=rows.is_packed,
        ).to(runtime.device)
        leaves_adapters = config.sharding.shards_parameters  # in fp32, as PEFT made them
        if not expected["autocast"] and not leaves_adapters and config.quantization.scheme == "none":
            hold_parameters(model, dtype)
        if expected["autocast"] and isinstance(config.tuning, FreezeTuning):  # the dtypes of training
            has_new_head = is_classifier or stage.has_new_head
            freeze(cast("PreTrainedModel", model), config.tuning, has_new_head=has_new_head)
            cast_trained_to_fp32(model)
    if is_classifier:
        objective = labelled_objective(runtime, read_classes(folder.artifact), rows)
    else:
        objective = proof_objective(runtime, stage, rows.meta.kind)
    scored = evaluate(runtime, model, objective, rows, micro_size=expected["micro_size"], limit=expected["rows"])
    difference = abs(scored.loss - expected["loss"])
    # Negated, so that NaN fails too.
    if not difference <= LOSS_TOLERANCE:
        raise CheckpointError(
            f"{folder.artifact}: re-opened, it scores {scored.loss:.5f} on {scored.rows} rows where the trainer scored "
            f"{expected['loss']:.5f}; they differ by {difference:.2g}, {LOSS_TOLERANCE} is allowed"
        )
    return scored.loss


def hold_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters as DeepSpeed does; buffers are kept: 16-bit rotary frequencies would change the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.evaluation.artifact_proof")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--stage", required=True)
    options = parser.parse_args()
    silence_libraries()
    folder = RunFolder(options.run_file.parent).stage(options.stage)
    config = load_config(RunFolder(options.run_file.parent)).for_stage(options.stage)
    expected = read_json(folder.proof)
    leave_out_unused(config, Path(expected["base_folder"]))
    try:
        write_json(folder.proof, {**expected, "reopened_loss": prove(config, options.stage, folder)})
    except OrchestratorError as error:
        write_json(folder.proof, {**expected, "problems": list(error.problems)})
        print("\n".join(error.problems), file=sys.stderr)
        return EXIT_DO_NOT_RESTART
    return EXIT_DONE


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())

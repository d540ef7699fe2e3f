"""The proof of an artifact: fresh ranks open it from its files alone and score it as the model in memory was scored.

It runs on as many ranks as wrote the artifact, sharded as they were, after they have left: nothing of a trainer is in
memory. Only a passed proof writes result.json.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from orchestrator.classification.classes import read_classes
from orchestrator.classification.model import open_classifier
from orchestrator.classification.objective import labelled_objective
from orchestrator.config.run import makes_classifier
from orchestrator.config.tuning import FreezeTuning
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime, environment_rank, start_scoring_runtime
from orchestrator.errors import EXIT_SAVED, CheckpointError, ConfigError
from orchestrator.files.manifest import MANIFEST, file_digest, read_manifest
from orchestrator.metrics import phases as phase
from orchestrator.models.artifact import open_artifact, open_model
from orchestrator.models.loading import weights_dtype
from orchestrator.models.tuning import cast_adapters_as_deepspeed, cast_trained_to_fp32, freeze
from orchestrator.run_folder.checkpoints import saved_steps
from orchestrator.run_state.proof_note import ProofNote, close_note, read_note
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext
from orchestrator.run_state.stage_result import finish
from orchestrator.training.evaluation import evaluate
from orchestrator.training.objectives import proof_objective
from orchestrator.training.out_of_memory import autopsy, ran_out_of_memory

LOSS_TOLERANCE = 1e-3


@torch.no_grad()
def run(context: StageContext) -> int:
    """Prove a written artifact and write the stage's result; return the exit code. CheckpointError if it fails."""
    if not context.phases.is_at(phase.PROOF):
        context.phases.begin(phase.PROOF, unit=phase.ROWS)
    note, rank = read_note(context.folder), environment_rank()
    record = Recorder(context, rank=rank)
    record.last_step = note.summary.get("steps", 0)
    record.event("prove", world_size=context.config.world_size, began=context.began)
    _refuse_other_ranks(context, note)
    try:
        _check_files(context, note, rank)
        runtime = start_scoring_runtime(context.config, autocast=note.autocast, phases=context.phases)
        if _is_stopped(context, runtime):
            return _stopped(context, record)
        loss = reopened_loss(context, runtime, note)
    except CheckpointError as error:
        close_note(context.folder, problems=error.problems)
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        raise autopsy(context, error, rank=rank, step=record.last_step, device=device) from error
    if record.is_main:
        close_note(context.folder, reopened_loss=loss)
    proof = {"loss": note.loss, "reopened_loss": loss, "rows": note.rows}
    return finish(context, record, note.summary, kind=note.kind, proof=proof)


def reopened_loss(context: StageContext, runtime: Runtime, note: ProofNote) -> float:
    """The artifact's loss on the noted rows; CheckpointError if it is not the noted one. Every rank must call it."""
    rows = PreparedRows.open(Path(note.data))
    model = runtime.hold(_opened(context, runtime, note, packed=rows.is_packed))
    if makes_classifier(context.config, context.name):
        objective = labelled_objective(runtime, read_classes(context.folder.artifact), rows)
    else:
        objective = proof_objective(runtime, context.stage, rows.meta.kind)
    scored = evaluate(runtime, model, objective, rows, micro_size=note.micro_size, limit=note.rows)
    difference = abs(scored.loss - note.loss)
    # Negated, so that NaN fails too.
    if not difference <= LOSS_TOLERANCE:
        raise CheckpointError(
            f"{context.folder.artifact}: re-opened, it scores {scored.loss:.5f} on {scored.rows} rows where the trainer scored "
            f"{note.loss:.5f}; they differ by {difference:.2g}, {LOSS_TOLERANCE} is allowed"
        )
    return scored.loss


def _opened(context: StageContext, runtime: Runtime, note: ProofNote, *, packed: bool) -> torch.nn.Module:
    """The model from its files, in the types in which the trainer computed."""
    config, stage, folder = context.config, context.stage, context.folder.artifact
    dtype = weights_dtype(config, uses_deepspeed=not note.autocast)
    if stage.makes == "merged model":
        return open_model(folder, config, dtype, packed=False)
    is_classifier = makes_classifier(config, context.name)
    open_it = open_classifier if is_classifier else partial(open_artifact, scores=stage.makes == "reward model")
    model = open_it(folder, base_folder=Path(note.base_folder), config=config, weights_dtype=dtype, packed=packed)
    leaves_adapters = config.sharding.shards_parameters  # in fp32, as PEFT made them
    if not note.autocast and not leaves_adapters and config.quantization.scheme == "none":
        hold_parameters(model, dtype)
    if config.sharding.shards_parameters and config.quantization.is_4bit:
        cast_adapters_as_deepspeed(model, dtype)
    if note.autocast and isinstance(config.tuning, FreezeTuning):  # the dtypes of training
        has_new_head = is_classifier or stage.has_new_head
        freeze(cast("PreTrainedModel", model), config.tuning, has_new_head=has_new_head)
        cast_trained_to_fp32(model)
    return model


def hold_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters as DeepSpeed does; buffers are kept: 16-bit rotary frequencies would change the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _refuse_other_ranks(context: StageContext, note: ProofNote) -> None:
    cluster = context.config.cluster
    if context.config.world_size != note.world_size:
        raise ConfigError(
            f"{context.folder.artifact} was written by {note.world_size} ranks, and its proof was started with "
            f"{context.config.world_size} ({cluster.nodes} nodes x {cluster.processes_per_node}): start it with {note.world_size}, or "
            f"remove {context.folder.proof}, to write the artifact again with the ranks there are"
        )


def _check_files(context: StageContext, note: ProofNote, rank: int) -> None:
    """Compare the files with the bytes that were written, each rank a share: damage would only show as another loss."""
    folder = context.folder.artifact
    try:
        read_manifest(folder, share=slice(rank, None, context.config.world_size))
        if file_digest(folder / MANIFEST) != note.manifest_sha256:
            raise CheckpointError(f"{folder / MANIFEST}: it is not the one that was written with the artifact")
    except CheckpointError as error:
        raise CheckpointError([*error.problems, _how_to_write_again(context)]) from None


def _how_to_write_again(context: StageContext) -> str:
    steps = saved_steps(context.folder)
    source = f"from the checkpoint of step {steps[-1]}" if steps else "from the start of the stage"
    return f"the same command writes the artifact again, {source}"


def _is_stopped(context: StageContext, runtime: Runtime) -> bool:
    """Whether any rank was asked to stop."""
    (votes,) = runtime.sum_over_ranks([float(context.stop.reason() is not None)])
    return votes > 0


def _stopped(context: StageContext, record: Recorder) -> int:
    why = context.stop.reason() or "another rank was asked to stop"
    record.event("stop", step=record.last_step, why=why)
    record.log(f"stopped before the proof ({why}); the same command goes on with the proof")
    record.finish({}, outcome="stopped")
    record.close_attempt("stopped", why, exit_code=EXIT_SAVED)
    return EXIT_SAVED

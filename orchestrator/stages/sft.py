"""Supervised fine-tuning: from a base model and prepared rows to a proven artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import set_seed

from orchestrator.architecture import read_architecture
from orchestrator.config.stages import SftStage
from orchestrator.dataset.ledger import Ledger, ledger_path
from orchestrator.dataset.order import make_order
from orchestrator.errors import EXIT_SAVED
from orchestrator.flops import flops_per_token
from orchestrator.schedule import total_steps
from orchestrator.training.checkpoint import Checkpointer, Subject
from orchestrator.training.context import Context, Record
from orchestrator.training.data.rows import PreparedRows
from orchestrator.training.evaluation import Evaluation, evaluate
from orchestrator.training.finish import finish_stage
from orchestrator.training.loop import Hooks, Job, Progress, train
from orchestrator.training.losses import sft_loss
from orchestrator.training.model import load_model, weights_dtype
from orchestrator.training.optimizers import build_optimizer
from orchestrator.training.runtime import Runtime, start_runtime
from orchestrator.training.tuning import apply_tuning, count_trainable


@dataclass(frozen=True, kw_only=True)
class Held:
    """The held-out rows and how they are scored."""

    rows: PreparedRows
    micro_size: int


def run(context: Context) -> int:
    """Trains, writes and proves; the exit code of the rank."""
    runtime = start_runtime(context.config, context.stage)
    record = Record(context, rank=runtime.rank)
    record.event("start", world_size=runtime.world_size, device=str(runtime.device))
    started = time.time()
    job, held, checkpointer, progress = assemble(context, runtime, record)
    before = _evaluate_first(job, held, record, progress)
    hooks = Hooks(
        record=record.metrics,
        evaluate=lambda at: _evaluate(job, held, record, checkpointer, at.step),
        save=checkpointer.save,
        roll_back=checkpointer.roll_back,
        fault=record.skipped_update,
        stop_reason=context.stop.reason,
        took=_ledger(context, runtime),
    )
    record.event("train", step=progress.step, steps=job.steps)
    progress = train(job, progress, hooks)
    checkpointer.close()
    if progress.step < job.steps:
        return _stopped(record, runtime, progress, context.stop.reason() or "another rank was asked to stop")
    after = _score(job, held)
    _record_evaluation(record, progress.step, after)
    return finish_stage(context, job, record, progress, before=before, after=after, seconds=time.time() - started)


def assemble(context: Context, runtime: Runtime, record: Record) -> tuple[Job, Held | None, Checkpointer, Progress]:
    config, stage = context.config, context.stage
    rows = PreparedRows.open(context.train_data, pad_to_multiple_of=stage.data.pad_to_multiple_of)
    order = make_order(stage.data, lengths=rows.lengths, global_size=stage.batch.global_size, seed=config.seeds.data)
    steps = total_steps(max_steps=stage.max_steps, epochs=stage.epochs, steps_per_epoch=order.steps_per_epoch)
    record.total_steps = steps
    set_seed(config.seeds.weights)
    dtype = weights_dtype(config, uses_deepspeed=runtime.uses_deepspeed)
    model = apply_tuning(load_model(context.base_folder, config, weights_dtype=dtype, packed=rows.is_packed), config)
    _tell_size(record, model)
    optimizer = build_optimizer(model, stage.optimizer)
    prepared_model, prepared_optimizer = runtime.accelerator.prepare(model, optimizer)
    set_seed(config.seeds.weights + runtime.rank)
    job = Job(
        runtime=runtime,
        model=prepared_model,
        optimizer=prepared_optimizer,
        loss=sft_loss(runtime),
        stage=stage,
        rows=rows,
        order=order,
        steps=steps,
        flops_per_token=_flops_per_token(context),
        peak_flops=_peak_flops(context),
    )
    checkpointer = Checkpointer(context, _subject(job), record)
    progress = checkpointer.resume()
    if progress is not None:
        record.say(f"going on from step {progress.step} of {steps}")
    return job, _held_out(context, stage), checkpointer, progress or Progress(step=0, tokens=0, trained_tokens=0)


def _subject(job: Job) -> Subject:
    """What checkpoints hold, and the loss that a resume must find again."""
    count = job.stage.checkpoint.probe_rows
    micro_size = job.stage.batch.micro_size
    return Subject(
        runtime=job.runtime,
        model=job.model,
        optimizer=job.optimizer,
        data_digest=job.rows.digest,
        probe=(lambda: evaluate(job.runtime, job.model, job.loss, job.rows, micro_size=micro_size, limit=count).loss)
        if count
        else None,
    )


def _held_out(context: Context, stage: SftStage) -> Held | None:
    if context.evaluation_data is None:
        return None
    return Held(rows=PreparedRows.open(context.evaluation_data), micro_size=stage.batch.micro_size)


def _ledger(context: Context, runtime: Runtime) -> Callable[[int, Sequence[int]], None]:
    """Writes down the rows of every step where the stage asks for it."""
    if not context.stage.ledger:
        return lambda _step, _rows: None
    path = ledger_path(context.folder.samples, runtime.rank)
    return Ledger(path, attempt=context.attempt, rank=runtime.rank, world_size=runtime.world_size).record


def _score(job: Job, held: Held | None) -> Evaluation | None:
    if held is None:
        return None
    return evaluate(job.runtime, job.model, job.loss, held.rows, micro_size=held.micro_size)


def _evaluate(job: Job, held: Held | None, record: Record, checkpointer: Checkpointer, step: int) -> None:
    scored = _score(job, held)
    _record_evaluation(record, step, scored)
    if scored is not None:
        checkpointer.note_evaluation(step, scored.loss)


def _evaluate_first(job: Job, held: Held | None, record: Record, progress: Progress) -> Evaluation | None:
    """The held-out loss of the base, once for the life of the run."""
    if progress.step > 0:
        return None
    before = _score(job, held)
    _record_evaluation(record, 0, before)
    return before


def _record_evaluation(record: Record, step: int, evaluation: Evaluation | None) -> None:
    if evaluation is not None:
        record.metrics({"step": step, "eval_loss": evaluation.loss, "eval_trained_tokens": evaluation.trained_tokens})


def _stopped(record: Record, runtime: Runtime, progress: Progress, why: str) -> int:
    record.event("stop", step=progress.step, why=why)
    record.say(f"stopped after step {progress.step} ({why}); the same command goes on from here")
    record.finish({}, outcome="stopped")
    record.close_attempt("stopped", why, exit_code=EXIT_SAVED)
    runtime.end()
    return EXIT_SAVED


def _tell_size(record: Record, model: torch.nn.Module) -> None:
    trainable, total = count_trainable(model)
    record.event("model", trainable_parameters=trainable, parameters=total)
    record.say(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")


def _flops_per_token(context: Context) -> float | None:
    architecture = read_architecture(context.base_folder)
    if architecture is None:
        return None
    return flops_per_token(architecture, context.config, length=context.stage.data.max_length)


def _peak_flops(context: Context) -> float | None:
    peak = context.config.cluster.peak_tflops
    return None if peak is None else peak * 1e12 * context.config.world_size

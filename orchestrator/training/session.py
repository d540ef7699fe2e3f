"""The single training path of all stages: assemble, evaluate, loop, finish. Stages differ only in their recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from accelerate.utils import set_seed

from orchestrator.data.ledger import Ledger, ledger_path
from orchestrator.data.order import make_order
from orchestrator.dataloader.prefetch import Batches
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime, start_runtime
from orchestrator.errors import EXIT_SAVED
from orchestrator.generation.greedy_answers import greedy_answers
from orchestrator.metrics import phases as phase
from orchestrator.models.layer_transforms import compile_layers
from orchestrator.models.loading import weights_dtype
from orchestrator.models.tuning import build_policy, cast_adapters_as_deepspeed, keep_input_types
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext, training_stage
from orchestrator.schedule import total_steps
from orchestrator.training.adalora_ranks import allocation_of
from orchestrator.training.checkpointing.checkpointer import CheckpointedState, Checkpointer
from orchestrator.training.custom_metrics import with_metrics
from orchestrator.training.dtype_report import report_number_type
from orchestrator.training.early_stopping import judged, metric_of
from orchestrator.training.evaluation import Evaluation, evaluate, values_of
from orchestrator.training.finish import write_stage
from orchestrator.training.gradual_unfreezing import gradual_unfreezing
from orchestrator.training.loop import is_over, pauses
from orchestrator.training.loop_state import LoopCallbacks, LoopInputs, Progress
from orchestrator.training.objectives import Objective, proof_objective
from orchestrator.training.optimizer import build_optimizer
from orchestrator.training.out_of_memory import autopsy, ran_out_of_memory
from orchestrator.training.phased_loop import announced
from orchestrator.training.profiled_loop import train_profiled
from orchestrator.training.recipe import PROOF_ROWS, BuildModel, MakeRecipe, Recipe, Session
from orchestrator.training.startup_report import flops_of, log_kernels, log_model_size, peak_flops
from orchestrator.training.throughput import keep_measured, measuring


def run_training(context: StageContext, make_recipe: MakeRecipe, *, build_model: BuildModel = build_policy) -> int:
    """Train, write and prove; return the exit code of the rank. TrainingFailed with an autopsy if memory runs out."""
    context.phases.begin(phase.LOADING)
    runtime = start_runtime(context.config, training_stage(context), context.phases)
    record = Recorder(context, rank=runtime.rank)
    try:
        return _train(context, runtime, record, make_recipe, build_model)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise autopsy(context, error, rank=runtime.rank, step=record.last_step + 1, device=runtime.device) from error


def _train(
    context: StageContext, runtime: Runtime, record: Recorder, make_recipe: MakeRecipe, build_model: BuildModel
) -> int:
    record.event("start", world_size=runtime.world_size, device=str(runtime.device), began=context.began)
    report_number_type(context, record, runtime.device)
    started = time.time()
    session = open_session(context, runtime, record, build_model)
    job, recipe, checkpointer, progress = assemble(session, make_recipe)
    context.phases.begin(phase.FIRST_EVALUATION, unit=phase.ROWS)
    before = None if progress.step else _scored(recipe, record, 0)
    stopping = training_stage(context).early_stopping
    if stopping is not None and not progress.step:
        metric_of(before, stopping, stage=context.name)
    record.event("train", step=progress.step, steps=job.steps)
    context.phases.begin(phase.FIRST_STEP)
    hooks = announced(hooks_of(session, recipe, checkpointer), context.phases, total_steps=job.steps)
    progress = train_profiled(context, record, job, progress, hooks)
    job.batches.close()
    waited = time.perf_counter()
    with context.phases.during(phase.SAVING):
        checkpointer.close()
    record.event("trained", step=progress.step, close_seconds=time.perf_counter() - waited)
    keep_measured(session)
    if not is_over(job, progress):
        why = (
            f"pause_at_step={training_stage(context).pause_at_step}" if pauses(job, progress) else context.stop.reason()
        )
        return _stopped(record, runtime, progress, why or "another rank was asked to stop")
    context.phases.begin(phase.LAST_EVALUATION, unit=phase.ROWS)
    progress, after = _settled(recipe, record, checkpointer, progress)
    return write_stage(session, recipe, progress, before=before, after=after, seconds=time.time() - started)


def open_session(context: StageContext, runtime: Runtime, record: Recorder, build_model: BuildModel) -> Session:
    """Build model and optimizer and prepare them with Accelerate."""
    config, stage = context.config, training_stage(context)
    rows = PreparedRows.open(context.train_data, pad_to_multiple_of=stage.data.pad_to_multiple_of)
    held = None if context.evaluation_data is None else PreparedRows.open(context.evaluation_data)
    # The same on every rank: new heads and adapters must start equal.
    set_seed(config.seeds.weights)
    dtype = weights_dtype(config, uses_deepspeed=runtime.uses_deepspeed)
    model = build_model(context, dtype, rows.is_packed)
    if runtime.autocast_dtype is not None:
        keep_input_types(model)
    if config.sharding.shards_parameters and config.quantization.is_4bit:
        cast_adapters_as_deepspeed(model, dtype)
    if config.model.compile:
        layers = compile_layers(model)
        record.event("compile", layers=layers)
        record.log(f"{layers} layers are compiled at their first use, which may take minutes")
    log_model_size(record, model)
    log_kernels(context, record, model, runtime.device)
    tuning = config.tuning
    optimizer = build_optimizer(
        model, stage.optimizer, is_gradual=tuning.is_gradual, lora_plus_ratio=tuning.b_rate_ratio
    )
    unfreezing = gradual_unfreezing(model, optimizer) if tuning.is_gradual else None
    prepared_model, prepared_optimizer = runtime.accelerator.prepare(model, optimizer)
    # From here on the ranks draw different noise, such as dropout.
    set_seed(config.seeds.weights + runtime.rank)
    return Session(
        context=context,
        runtime=runtime,
        record=record,
        model=prepared_model,
        optimizer=prepared_optimizer,
        rows=rows,
        held=held,
        unfreezing=unfreezing,
    )


def assemble(session: Session, make_recipe: MakeRecipe) -> tuple[LoopInputs, Recipe, Checkpointer, Progress]:
    """Build the job and find the progress to resume from."""
    context, runtime, record = session.context, session.runtime, session.record
    stage = training_stage(context)
    recipe = make_recipe(session)
    if recipe.answers is not None:
        recipe = replace(recipe, score=with_metrics(stage.metrics, runtime, recipe.score, recipe.answers))
    steps = total_steps(max_steps=stage.max_steps, epochs=stage.epochs, steps_per_epoch=recipe.order.steps_per_epoch)
    record.total_steps = steps
    job = LoopInputs(
        runtime=runtime,
        model=session.model,
        optimizer=session.optimizer,
        objective=recipe.objective,
        stage=stage,
        rows=recipe.rows,
        batches=Batches(recipe.rows, runtime.device, reads_ahead=isinstance(recipe.rows, PreparedRows)),
        order=recipe.order,
        steps=steps,
        flops_per_token=flops_of(context),
        peak_flops=peak_flops(context),
        unfreezing=session.unfreezing,
        allocation=allocation_of(runtime, session.model, session.optimizer, context.config.tuning, steps=steps),
    )
    if session.unfreezing is not None:
        session.unfreezing.plan(
            context.config.tuning, record, steps=steps, steps_per_epoch=recipe.order.steps_per_epoch
        )
    subject = CheckpointedState(
        runtime=runtime,
        model=session.model,
        optimizer=session.optimizer,
        data_digest=session.rows.digest,
        probe=recipe.probe,
    )
    checkpointer = Checkpointer(context, subject, record)
    progress = checkpointer.resume()
    if progress is not None:
        record.log(f"resuming from step {progress.step} of {steps}")
    return job, recipe, checkpointer, progress or Progress(step=0, tokens=0, trained_tokens=0)


def supervised_recipe(session: Session, objective: Objective) -> Recipe:
    """The recipe over prepared rows, for every kind of stage except those that generate their rows."""
    context, rows, held = session.context, session.rows, session.held
    stage = training_stage(context)
    micro_size, count = stage.batch.micro_size, stage.checkpoint.probe_rows

    score_on = partial(evaluate, session.runtime, session.model, objective, micro_size=micro_size)

    return Recipe(
        objective=objective,
        rows=rows,
        order=make_order(
            stage.data, lengths=rows.lengths, global_size=stage.batch.global_size, seed=context.config.seeds.data
        ),
        score=lambda: None if held is None else score_on(held, first=PROOF_ROWS),
        probe=(lambda: score_on(rows, limit=count).loss) if count else None,
        proof=lambda: proof_of(session),
        answers=None if held is None else greedy_answers(context, session.runtime, session.model, held),
    )


def proof_of(session: Session) -> Evaluation:
    """The trainer's own score on the rows that the proof scores: held-out rows, else the first training rows."""
    stage, rows = training_stage(session.context), session.held or session.rows
    objective = proof_objective(session.runtime, stage, rows.meta.kind)
    return evaluate(
        session.runtime, session.model, objective, rows, micro_size=stage.batch.micro_size, limit=PROOF_ROWS
    )


def hooks_of(session: Session, recipe: Recipe, checkpointer: Checkpointer) -> LoopCallbacks:
    """Build the side effects of the loop."""
    context, record = session.context, session.record

    def judge(at: Progress) -> Progress:
        scored = _scored(recipe, record, at.step)
        if scored is not None:
            checkpointer.note_evaluation(at.step, scored.loss)
        settings = training_stage(context).early_stopping
        if settings is None or at.health.streak:  # during a streak of faults the weights are in doubt
            return at
        value = metric_of(scored, settings, stage=context.name)
        return replace(at, stopping=judged(at.stopping, at.step, value, settings, session.runtime, record))

    return LoopCallbacks(
        record=measuring(session),
        evaluate=judge,
        save=checkpointer.save,
        rehearse=checkpointer.rehearse,
        roll_back=checkpointer.roll_back,
        fault=record.skipped_update,
        stop_reason=context.stop.reason,
        before_step=recipe.before_step,
        rows_consumed=_ledger(context, session.runtime),
    )


def _settled(
    recipe: Recipe, record: Recorder, checkpointer: Checkpointer, progress: Progress
) -> tuple[Progress, Evaluation | None]:
    """Restore and score the model to save: the best one under early stopping, otherwise the last."""
    best = progress.stopping.best_step
    if best is None or best == progress.step:
        return progress, _scored(recipe, record, progress.step)
    if not checkpointer.restore_step(best):
        progress = replace(progress, stopping=replace(progress.stopping, best_step=None))
    return progress, recipe.score()


def _scored(recipe: Recipe, record: Recorder, step: int) -> Evaluation | None:
    start = time.perf_counter()
    scored = recipe.score()
    if scored is not None:
        facts = {"eval_trained_tokens": scored.trained_tokens, "eval_seconds": time.perf_counter() - start}
        record.metrics({"step": step, **facts, **values_of(scored)})
    return scored


def _ledger(context: StageContext, runtime: Runtime) -> Callable[[int, Sequence[int]], None]:
    """A callback that logs the row ids of every step if the stage asks for it."""
    if not training_stage(context).ledger:
        return lambda _step, _rows: None
    path = ledger_path(context.folder.samples, runtime.rank)
    return Ledger(path, attempt=context.attempt, rank=runtime.rank, world_size=runtime.world_size).record


def _stopped(record: Recorder, runtime: Runtime, progress: Progress, why: str) -> int:
    record.event("stop", step=progress.step, why=why)
    record.log(f"stopped after step {progress.step} ({why}); the same command continues from here")
    record.finish({}, outcome="stopped")
    record.close_attempt("stopped", why, exit_code=EXIT_SAVED)
    runtime.end()
    return EXIT_SAVED

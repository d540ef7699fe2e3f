"""Forecasts a stage from the facts about its data and from earlier runs. Must not import torch."""

from __future__ import annotations

from typing import Any, NoReturn

from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.training import TrainingStage
from orchestrator.data.epoch import epoch_of
from orchestrator.estimate.row_lengths import RowShape, guessed_packed_rows, guessed_shape, shape_of
from orchestrator.estimate.stage_time import ForecastInputs, forecast
from orchestrator.estimate.step_time import table_rate, why_no_rate
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.measured_speed import steadier_rate
from orchestrator.schedule import steps_per_epoch, total_steps

NO_FORECAST = {"tokens": None, "trained_tokens": None, "time": None, "cost": None, "checkpointing": None}
"""The forecast of a stage that trains nothing, or whose model is not known yet."""


def epoch_steps(stage: TrainingStage, data: DataFacts) -> int | None:
    """Optimizer steps of an epoch; exact if the data is prepared, None if unknown until then."""
    if data.prepared is not None:
        return data.prepared.steps_per_epoch
    depends_on_tokens = stage.data.packing != "none" or stage.data.tokens_per_batch is not None
    if data.train_rows is None or (depends_on_tokens and not stage.reads_prompts):
        return None
    return epoch_of(stage, data.train_rows, _no_lengths, seed=0).steps


def _no_lengths() -> NoReturn:
    raise AssertionError("no token budget is left where the rows are not prepared")


def forecast_fields(
    config: RunConfig, stage: TrainingStage, model: Architecture | None, data: DataFacts, *, steps: int | None
) -> dict[str, Any]:
    """Tokens, time, cost and checkpointing of a stage's plan."""
    prepared = data.prepared
    tokens = {
        "tokens": None if prepared is None else prepared.tokens,
        "trained_tokens": None if prepared is None else prepared.trained_tokens,
    }
    if model is None:
        return {**NO_FORECAST, **tokens}
    time, checkpointing, cost = forecast(config, stage, forecast_inputs(config, stage, model, data, steps=steps))
    return {**tokens, "time": time, "cost": cost, "checkpointing": checkpointing}


def forecast_inputs(
    config: RunConfig, stage: TrainingStage, model: Architecture, data: DataFacts, *, steps: int | None
) -> ForecastInputs:
    """The inputs of the forecast; a measurement on this machine replaces the hardware table."""
    measured, run = data.measured if data.measured is not None else (None, "")
    startup = None if measured is None else measured.startup_seconds
    guess = _guessed_steps(stage, data) if epoch_steps(stage, data) is None else None
    return ForecastInputs(
        model=model,
        shape=shape_for(stage, data),
        rate=(data.probed or table_rate(config))
        if measured is None
        else steadier_rate(measured, run, config, data.probed),
        why_no_rate=why_no_rate(config),
        steps=steps if guess is None else guess,
        steps_are_guessed=guess is not None,
        evaluation_rows=data.evaluation_rows or 0,
        train_rows=data.train_rows or 0,
        startup_seconds=config.cluster.restart_seconds if startup is None else startup,
        save_seconds=None if measured is None else measured.save_seconds,
        pause_seconds=None if measured is None else measured.save_pause_seconds,
    )


def shape_for(stage: TrainingStage, data: DataFacts) -> RowShape:
    """Row lengths of a stage, from prepared data or guessed."""
    packed = stage.data.packing != "none"
    if data.prepared is not None and data.prepared.rows:
        is_alike = packed or stage.data.group_by_length or stage.data.tokens_per_batch is not None
        return shape_of(data.prepared, micro_size=stage.batch.micro_size, grouped=is_alike)
    return guessed_shape(file_bytes=data.bytes, rows=data.train_rows, max_length=stage.data.max_length, packed=packed)


def _guessed_steps(stage: TrainingStage, data: DataFacts) -> int | None:
    """Steps guessed from the size of the files, if packing decides; None if the size is unknown, or `max_steps` is
    set.
    """
    per_epoch = guessed_epoch_steps(stage, data)
    if per_epoch is None or stage.max_steps is not None:
        return None
    return total_steps(max_steps=None, epochs=stage.epochs, steps_per_epoch=per_epoch)


def guessed_epoch_steps(stage: TrainingStage, data: DataFacts) -> int | None:
    """Steps of an epoch of packed rows, from the size of the files; None if that is also unknown."""
    if not data.bytes or stage.data.packing == "none":
        return None
    return steps_per_epoch(guessed_packed_rows(data.bytes, stage.data.max_length), stage.batch.global_size)

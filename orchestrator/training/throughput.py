"""Records a stage's speed while it trains, for `status` and for the next plan on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from orchestrator.architecture.read import read_architecture
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.statistics import prepared_facts
from orchestrator.estimate.row_lengths import shape_of
from orchestrator.estimate.stage_time import with_completions
from orchestrator.machine.job_processor import processor_key
from orchestrator.machine.processor import this_processor
from orchestrator.planning.measured_speed import AFTER_STEPS, MeasurementContext, write_measured
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.recipe import Session


def measuring(session: Session) -> Callable[[Mapping[str, Any]], None]:
    """A callback for every row of metrics that writes measured.json after the attempt's first `AFTER_STEPS` steps."""
    steps = 0

    def take(row: Mapping[str, Any]) -> None:
        nonlocal steps
        session.record.metrics(row)
        before, steps = steps, steps + int(row["num_steps"])
        if before < AFTER_STEPS <= steps:
            keep_measured(session)

    return take


def keep_measured(session: Session) -> None:
    """Write measured.json from the record so far; rank 0 only."""
    context = session.context
    model = read_architecture(context.base_folder)
    if not session.runtime.is_main or model is None:
        return
    basis = MeasurementContext(
        stage=context.name,
        model=model,
        attended=attended_tokens(context),
        time=time.time(),
        processor=processor_key(this_processor(), os.environ),
    )
    write_measured(context.folder, context.config, basis)


def attended_tokens(context: StageContext) -> float:
    """Tokens that attention sees as one document, averaged over tokens: the basis for counting FLOPs."""
    stage = cast("TrainingStage", context.stage)
    facts = prepared_facts(context.train_data, context.evaluation_data, stage=stage, seed=context.config.seeds.data)
    return with_completions(shape_of(facts, micro_size=1, grouped=True), stage).attended

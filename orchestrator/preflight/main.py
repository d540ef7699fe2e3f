"""Checks before GPU time is spent, and data preparation: `python -m orchestrator.preflight.main check|prepare FILE`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Literal, cast

from rich.console import Console

from orchestrator.classification.classes import classes_of, targets_of
from orchestrator.config.classification import ClassifyStage
from orchestrator.config.data import DataFormat
from orchestrator.config.evaluation import FIRST_SET
from orchestrator.config.run import RunConfig, Stage, data_sets_of
from orchestrator.config.training import TrainingStage
from orchestrator.data.epoch import Epoch, epoch_of
from orchestrator.data.formats.trainable import format_problem
from orchestrator.data.preparation.prepare import Prepared, ensure_prepared
from orchestrator.data.row_faults import fault_sentences
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import EXIT_DONE, EXIT_USER, DataError, OrchestratorError
from orchestrator.files.atomic import write_json
from orchestrator.files.cache import cache_folder
from orchestrator.metrics import phases as phase
from orchestrator.metrics.phases import Phases
from orchestrator.models.loading import attention_of, fetch_base, silence_libraries
from orchestrator.models.tuning import apply_tuning
from orchestrator.preflight.data_check import check_data
from orchestrator.preflight.data_report import print_report
from orchestrator.preflight.gradient_check import check_gradients
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import load_config


def check_stage(config: RunConfig, stage: Stage, base_folder: Path, console: Console, phases: Phases) -> list[str]:
    """Check data and gradients of one stage and print the results; return a sentence for every fault."""
    cache = cache_folder(config.cluster.scratch)
    problems: list[str] = []
    made: list[Prepared] = []
    for key, data in data_sets_of(stage).items():
        if key.startswith("sets."):
            console.print(key)
        phases.begin(phase.CHECKING, unit=phase.ROWS)
        report, prepared = check_data(
            data,
            tokenizer_folder=base_folder,
            cache=cache,
            seed=config.seeds.split,
            epoch=partial(_epoch, config, stage) if isinstance(stage, TrainingStage) else None,
            say=phases.above(console.print),
            advance=phases.advance,
        )
        phases.end()
        print_report(report, console)
        problems += fault_sentences(report.faults, dict(report.fault_counts))
        made.append(prepared)
    if not isinstance(stage, TrainingStage):
        return problems
    phases.begin(phase.GRADIENTS)
    rows = PreparedRows.open(made[0].train)
    unusable = _untrained(config, stage, rows)
    if unusable is not None:
        return [*problems, unusable]
    batch = rows.batch([int(rows.lengths.argmin())])
    try:
        attention = attention_of(config, packed=rows.is_packed)
        task, outputs = _head_of(config, stage, prepared.train)
        count = check_gradients(
            base_folder,
            batch,
            lambda model: apply_tuning(model, config, task=task),
            attention=attention,
            outputs=outputs,
        )
        phases.end()
        console.print(f"gradients       all {count} trained tensors of a two-layer copy of the model get one")
    except OrchestratorError as error:
        problems += error.problems
    phases.end()
    return problems


def _epoch(config: RunConfig, stage: TrainingStage, rows: PreparedRows) -> Epoch:
    return epoch_of(stage, rows.rows, lambda: rows.lengths, seed=config.seeds.data)


def _untrained(config: RunConfig, stage: Stage, rows: PreparedRows) -> str | None:
    """Why a stage would learn nothing from its prepared rows; for hub data sets the plan could not know this."""
    name = next(name for name, other in config.stages.items() if other is stage)
    problem = format_problem(stage, cast("DataFormat", rows.meta.format), None, field=f"stages.{name}.data.train")
    trains_tokens = stage.rows_wanted in ("text", "pair", "feedback")
    if problem is None and trains_tokens and not rows.meta.statistics.trained_tokens:
        return f"stages.{name}.data: no row has a trained token; see loss_on={stage.data.loss_on} and max_length={stage.data.max_length}"
    return problem


def _head_of(config: RunConfig, stage: Stage, train: Path) -> tuple[Literal["CAUSAL_LM", "SEQ_CLS"], int | None]:
    """PEFT's name of the task, and the width of a classifier's head. DataError if labels do not fit the problem."""
    if not isinstance(stage, ClassifyStage):
        return ("SEQ_CLS", 2) if stage.makes == "classifier" else ("CAUSAL_LM", None)
    rows = PreparedRows.open(train)
    name = next(name for name, other in config.stages.items() if other is stage)
    if rows.meta.kind != "class":
        raise DataError(
            f"stages.{name}.data: rows of format {rows.meta.format} have no classes; set data.train.format=classification"
        )
    classes = classes_of(stage, rows.meta, name=name)
    targets_of(rows, classes)
    return "SEQ_CLS", classes.outputs


def prepare_stage(config: RunConfig, stage: Stage, base_folder: Path, console: Console, phases: Phases) -> list[str]:
    """Prepare the rows of one stage and print where they are; return a sentence if there is nothing to learn."""
    say = partial(console.print, soft_wrap=True)
    for key, data in data_sets_of(stage).items():
        phases.begin(phase.PREPARING, unit=phase.ROWS)
        prepared = ensure_prepared(
            data,
            tokenizer_folder=base_folder,
            cache=cache_folder(config.cluster.scratch),
            seed=config.seeds.split,
            say=phases.above(say),
            advance=phases.advance,
        )
        phases.end()
        numbers = prepared.train_statistics
        state = "was there" if prepared.was_hit else "made"
        what = key if key.startswith("sets.") else "train"
        say(f"{what} {state}: {prepared.train} ({numbers.rows:,} rows, {numbers.tokens:,} tokens)")
        if prepared.evaluation is not None:
            say(f"evaluation: {prepared.evaluation}")
        if key == FIRST_SET and stage.trains:
            unusable = _untrained(config, stage, PreparedRows.open(prepared.train))
            if unusable is not None:
                return [unusable]
    return []


def main(phases: Phases | None = None) -> int:
    phases = phases or Phases()
    parser = argparse.ArgumentParser(prog="python -m orchestrator.preflight.main")
    parser.add_argument("verb", choices=("check", "prepare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--result", type=Path, default=None, help="file written last, once everything is done")
    options = parser.parse_args()
    silence_libraries()
    console = Console()
    config = load_config(RunFolder(options.file.parent))
    examine = check_stage if options.verb == "check" else prepare_stage
    problems: list[str] = []
    try:
        phases.begin(phase.FETCHING)
        say = phases.above(console.print)
        base_folder = fetch_base(config.model, cache=cache_folder(config.cluster.scratch), say=say)
        phases.end()
        for name in config.pipeline:
            console.print(f"stage {name}", style="bold")
            problems += examine(config.for_stage(name), config.stages[name], base_folder, console, phases)
    except OrchestratorError as error:
        problems += error.problems
    except KeyboardInterrupt:
        return 130
    phases.end()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if options.result is not None and not problems:
        write_json(options.result, {"stages": list(config.pipeline)})
    return EXIT_USER if problems else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

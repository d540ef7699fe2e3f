"""Exports a finished stage: `python -m orchestrator.merging.export RUN/run.json --stage S --to FOLDER`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from orchestrator.config.run import RunConfig
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime, start_single_runtime
from orchestrator.errors import EXIT_DONE, CheckpointError, OrchestratorError
from orchestrator.evaluation.artifact_proof import LOSS_TOLERANCE
from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import read_manifest
from orchestrator.merging.adapter_merge import forget, merge, publish_merged
from orchestrator.merging.comparison import Way, batches_of, compare
from orchestrator.merging.merge_source import Source
from orchestrator.metrics import phases as phase
from orchestrator.metrics.phases import Phases
from orchestrator.models.artifact import open_model
from orchestrator.models.loading import DTYPES, silence_libraries
from orchestrator.models.placement import place_for
from orchestrator.models.stage_inputs import find_base_folder, find_rows
from orchestrator.models.weight_stream import placed_on
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.artifacts import read_artifact
from orchestrator.run_state.frozen import load_config
from orchestrator.run_state.model_card import write_card

ROWS = 32
MICRO_SIZE = 4


def export(config: RunConfig, run: RunFolder, stage: str, target: Path, *, max_kl: float, phases: Phases) -> Way:
    """Merge, measure, write and prove; CheckpointError if the merge changed the model by more than `max_kl`."""
    artifact = read_artifact(run, stage)
    base_folder = find_base_folder(config, run, stage)
    rows = PreparedRows.open(find_rows(config, run, stage, base_folder=base_folder))
    runtime = start_single_runtime(config, autocast=False, phases=phases)
    phases.begin(phase.MERGING, unit=phase.ROWS)
    source = Source(config=config, base_folder=base_folder, artifact=artifact.path, kind=artifact.kind)
    batches = batches_of(rows, limit=ROWS, micro_size=MICRO_SIZE)
    place = place_for(base_folder, config, DTYPES[config.model.dtype], models=2)
    with placed_on(place):
        chosen, *others = merge(source, target, runtime, batches, say=phases.above(print))
    ways, best = [chosen.way, *(one.way for one in others)], chosen.way
    forget(others if best.kl <= max_kl else [chosen, *others])
    if not best.kl <= max_kl:  # negated, so that NaN is refused too
        raise CheckpointError(
            f"merged into the {best.name}, the model differs from the trained one by {best.kl:.3g} nats per token, "
            f"{max_kl:g} is allowed: publish the adapter itself ({artifact.path}), or type --max-kl {best.kl * 1.1:.2g}"
        )
    results = {
        name: read_json(run.stage(name).result)
        for name in config.pipeline[: config.pipeline.index(stage) + 1]
        if run.stage(name).result.exists()
    }
    card = write_card(config, results, ways=[asdict(way) for way in ways], price_per_hour=None, folder=artifact.path)
    facts = {"run": config.name, "stage": stage, "kind": "export", "base": config.model.base}
    phases.begin(phase.WRITING)
    publish_merged(chosen, target, card=card, facts=facts)
    phases.begin(phase.PROOF, unit=phase.ROWS)
    with placed_on(place):
        _prove(config, target, batches, runtime, best)
    return best


def _prove(config: RunConfig, target: Path, batches: list[Batch], runtime: Runtime, way: Way) -> None:
    """Read the folder back from disk and score it again."""
    read_manifest(target)
    model = runtime.hold(open_model(target, config, DTYPES[config.model.dtype], packed=False))
    loss = compare(way.name, runtime, model, model, batches).loss
    if not abs(loss - way.loss) <= LOSS_TOLERANCE:
        raise CheckpointError(f"{target}: re-opened, it scores {loss:.5f}, {way.loss:.5f} was measured before")


def main(phases: Phases | None = None) -> int:
    phases = phases or Phases()
    parser = argparse.ArgumentParser(prog="orchestrator export")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--max-kl", type=float, default=0.02)
    options = parser.parse_args()
    silence_libraries()
    run = RunFolder(options.run_file.parent)
    try:
        config = load_config(run).for_stage(options.stage)
        with torch.no_grad():
            way = export(config, run, options.stage, options.to, max_kl=options.max_kl, phases=phases)
    except OrchestratorError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    phases.end()
    print(f"exported to {options.to}: merged into the {way.name}, {way.kl:.2e} nats per token from the trained model")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

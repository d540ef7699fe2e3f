"""Merges an earlier stage's adapter into its base, measures the change, and proves the folder in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

from orchestrator.config.merging import MergeStage
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import start_scoring_runtime
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import read_json
from orchestrator.merging.adapter_merge import Candidate, forget, merge, publish_merged
from orchestrator.merging.comparison import Way, batches_of
from orchestrator.merging.merge_source import Source
from orchestrator.metrics import phases as phase
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.model_card import write_card
from orchestrator.run_state.proof_note import Expected, write_note
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.finish import leave_for_proof


def run(context: StageContext) -> int:
    """Merge, measure, write, prove; refuse a merge that changed the model by more than `max_kl`."""
    stage = cast("MergeStage", context.stage)
    start = context.start
    assert start is not None, "the pipeline's rules ask for a policy before it"
    context.phases.begin(phase.LOADING)
    started = time.time()
    runtime = start_scoring_runtime(context.config, autocast=False, phases=context.phases)
    record = Recorder(context, rank=runtime.rank)
    record.event("start", world_size=runtime.world_size)
    source = Source(config=context.config, base_folder=context.base_folder, artifact=start.folder, kind=start.kind)
    rows = PreparedRows.open(context.train_data)
    batches = batches_of(rows, limit=stage.rows, micro_size=stage.micro_size)
    context.phases.begin(phase.MERGING, unit=phase.ROWS)
    best, *others = merge(source, context.folder.artifact, runtime, batches, say=record.log)
    ways, way = [best.way, *(one.way for one in others)], best.way
    if runtime.is_main:
        forget(others if way.kl <= stage.max_kl else [best, *others])
    if not way.kl <= stage.max_kl:  # negated, so that NaN is refused too
        raise CheckpointError(
            f"merged into the {way.name}, the model differs from the trained one by {way.kl:.3g} nats per token, "
            f"max_kl={stage.max_kl:g}: keep the adapter apart, or raise stages.{context.name}.max_kl if that is acceptable"
        )
    if runtime.is_main:
        _publish(context, stage, best, ways)
        expected = Expected(
            data=context.train_data,
            rows=min(stage.rows, rows.rows),
            loss=way.loss,
            micro_size=stage.micro_size,
            autocast=False,
        )
        summary = {
            "kl": way.kl,
            "agreement": way.agreement,
            "way": way.name,
            "ways": [asdict(one) for one in ways],
            "seconds": time.time() - started,
        }
        write_note(context, expected, kind=ArtifactKind.MERGED, summary=summary, world_size=runtime.world_size)
    return leave_for_proof(context, runtime, record)


def _publish(context: StageContext, stage: MergeStage, best: Candidate, ways: Sequence[Way]) -> None:
    """Write the card of the best candidate and give it its name."""
    assert context.start is not None
    run_folder = RunFolder(context.run_file.parent)
    results = {
        name: read_json(run_folder.stage(name).result)
        for name in context.config.pipeline
        if name != context.name and run_folder.stage(name).result.exists()
    }
    described = [asdict(way) for way in ways]
    card = write_card(
        context.config, results, ways=described, price_per_hour=stage.price_per_hour, folder=context.start.folder
    )
    facts = {"run": context.config.name, "stage": context.name, "kind": "merge", "base": context.config.model.base}
    context.phases.begin(phase.WRITING)
    publish_merged(best, context.folder.artifact, card=card, facts=facts)

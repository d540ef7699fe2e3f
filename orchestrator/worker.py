"""One rank of one stage: `python -m orchestrator.worker RUN/run.json --stage sft --attempt K`. Never sees Hydra."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.config.pipeline import inputs_of
from orchestrator.config.run import RunConfig, Stage, data_sets_of
from orchestrator.distributed.import_blocking import garbage_collection_paused, leave_out_deepspeed, leave_out_unused
from orchestrator.errors import EXIT_DEFECT, EXIT_DONE, EXIT_WRITTEN, CheckpointError, OrchestratorError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.cache import cache_folder
from orchestrator.files.waiting import wait_for
from orchestrator.machine.fresh_start import START, become_second_start, fresh_port, meet_again, start_number
from orchestrator.machine.openmp import limit_spinning
from orchestrator.metrics import phases as phase
from orchestrator.metrics.phases import Phases, read_report
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_folder.stop_request import StopRequest, job_deadline
from orchestrator.run_state.artifacts import Artifact, check_artifacts, read_artifact
from orchestrator.run_state.attempts import next_attempt, write_fault
from orchestrator.run_state.content_digests import content_digests
from orchestrator.run_state.frozen import load_config
from orchestrator.run_state.proof_note import awaits_proof
from orchestrator.run_state.reuse import stage_digest
from orchestrator.run_state.soup_members import ExternalMember, read_member
from orchestrator.stages import STAGES

PROOF = "orchestrator.evaluation.artifact_proof"
PREPARE_AT_MOST_SECONDS = 60.0
"""Data preparation that takes longer is refused: GPUs would be idle."""


def main(argv: list[str] | None = None) -> int:
    began = time.time()
    limit_spinning(os.environ)
    options = _options(argv)
    run_file: Path = options.run_file.resolve()
    config = load_config(RunFolder(run_file.parent))
    folder = RunFolder(run_file.parent).stage(options.stage)
    # A requeued or chained job may find its stage finished.
    if folder.result.exists():
        return EXIT_DONE
    attempt = options.attempt or next_attempt(folder)
    rank, start = int(os.environ.get("RANK", "0")), start_number(os.environ)
    stop = StopRequest(folder.stop, deadline=job_deadline(os.environ, lead_seconds=config.cluster.stop_lead_seconds))
    phases = _phases_of(folder, attempt, rank, began, start=start)
    try:
        with garbage_collection_paused():
            run = _made_ready(config, options.stage, run_file, attempt=attempt, stop=stop, phases=phases)
        return run()
    # KeyboardInterrupt and SystemExit too: every end leaves a record of its cause.
    except BaseException as error:
        return _die(folder, attempt, rank, error)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.worker")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument(
        "--attempt", type=int, default=None, help="number of this attempt; the next free one by default"
    )
    return parser.parse_args(argv)


def _phases_of(folder: StageFolder, attempt: int, rank: int, began: float, *, start: int) -> Phases:
    """The progress of this rank, continued from its first start; only the first rank writes and prints it."""
    if rank:
        return Phases(began=began)

    def say(sentence: str) -> None:
        with contextlib.suppress(OSError):  # a full disk under the log must not stop training
            print(sentence, flush=True)

    known = read_report(folder.phases) if start > 1 else None
    if known is not None and known.attempt == attempt:
        return Phases(folder.phases, attempt=attempt, known=known, say=say)
    return Phases(folder.phases, attempt=attempt, began=began, say=say)


def _made_ready(
    config: RunConfig, name: str, run_file: Path, *, attempt: int, stop: StopRequest, phases: Phases
) -> Callable[[], int]:
    """The callable that runs the stage, once its inputs are present and its modules imported."""
    if not phases.is_at(phase.PROOF):
        phases.begin(phase.FETCHING)
    leave_out_deepspeed(config)
    folder = RunFolder(run_file.parent).stage(name)
    stage, config = config.stages[name], config.for_stage(name)
    artifacts = {source: read_artifact(RunFolder(run_file.parent), source) for source in inputs_of(config, name)}
    external = {member: read_artifact(found.run, found.stage) for member, found in _external_artifacts(stage).items()}
    # Before the base is fetched, which may take minutes; once more below, with the digests of its content.
    check_artifacts(config, name, {**artifacts, **external})
    digest = stage_digest(config, name, {source: artifact.digest for source, artifact in artifacts.items()})
    inputs = _inputs(config, name, folder, attempt, phases, digest=digest)
    content: dict[str, str] = inputs["content"]
    check_artifacts(config, name, {**artifacts, **external}, content=content)
    if not inputs["proves"]:
        phases.begin(phase.IMPORTING)
    elif not phases.is_at(phase.PROOF):
        phases.begin(phase.PROOF, unit=phase.ROWS)
    leave_out_unused(config, Path(inputs["base_folder"]))
    module = importlib.import_module(PROOF if inputs["proves"] else STAGES[stage.kind])
    from orchestrator.models.loading import silence_libraries
    from orchestrator.run_state.stage_context import StageContext

    silence_libraries()
    context = StageContext(
        config=config,
        name=name,
        stage=stage,
        folder=folder,
        run_file=run_file,
        attempt=attempt,
        stop=stop,
        began=phases.began,
        phases=phases,
        base_folder=Path(inputs["base_folder"]),
        train_data=Path(inputs["train"]),
        evaluation_data=Path(inputs["evaluation"]) if inputs["evaluation"] is not None else None,
        sets={key: Path(folder) for key, folder in inputs["sets"].items()},
        start=_start(stage, artifacts),
        other_models=[
            _as_start(artifact, member) for member, artifact in _blended_artifacts(stage, artifacts, external).items()
        ],
        rewards={source: artifact.path for source, artifact in artifacts.items() if artifact.is_reward},
        input_digests={source: artifact.digest for source, artifact in artifacts.items()},
        content_digests=content,
        digest=digest,
    )
    return partial(module.run, context)


def _start(stage: Stage, artifacts: Mapping[str, Artifact]) -> Any:
    return None if stage.start_from is None else _as_start(artifacts[stage.start_from], stage.start_from)


def _as_start(artifact: Artifact, name: str) -> Any:
    from orchestrator.run_state.stage_context import ParentArtifact

    return ParentArtifact(stage=name, folder=artifact.path, kind=artifact.kind)


def _external_artifacts(stage: Stage) -> dict[str, ExternalMember]:
    return {member: read_member(member) for member in stage.external_members}


def _blended_artifacts(
    stage: Stage, artifacts: Mapping[str, Artifact], external: Mapping[str, Artifact]
) -> dict[str, Artifact]:
    """The models blended with the artifact that the stage starts from, in configuration order."""
    return {name: artifacts[name] for name in stage.blended_stages} | dict(external)


def _inputs(
    config: RunConfig, name: str, folder: StageFolder, attempt: int, phases: Phases, *, digest: str
) -> dict[str, Any]:
    """Base model and prepared data, and whether all that is left is the proof: rank 0 finds out before any process group
    exists, and the others wait for its note.
    """
    start = start_number(os.environ)
    if int(os.environ.get("RANK", "0")) == 0:
        inputs = (
            _bring_inputs(config, name, run_directory=folder.root.parent, phases=phases)
            if start == 1
            else read_json(folder.prepared)
        )
        proves = awaits_proof(folder, digest)
        if start > 1 and not proves:
            raise CheckpointError(f"{folder.proof}: it was written with the artifact, and is no longer there")
        note = {**inputs, "attempt": attempt, "start": start, "proves": proves}
        write_json(folder.prepared, note | ({"port": fresh_port(os.environ)} if start > 1 else {}))
    else:
        wait_for(folder.prepared, until=lambda: _is_ready(folder, attempt, start))
    note = read_json(folder.prepared)
    if start > 1:
        meet_again(os.environ, port=note["port"])
    return note


def _is_ready(folder: StageFolder, attempt: int, start: int) -> bool:
    """Whether rank 0 has left its note of this start. OrchestratorError if it could not."""
    note = read_json(folder.prepared) if folder.prepared.exists() else {}
    if (note.get("attempt"), note.get("start")) == (attempt, start):
        return True
    if folder.fault(attempt, 0).exists():
        raise OrchestratorError("rank 0 could not prepare the inputs")
    return False


def _bring_inputs(config: RunConfig, name: str, *, run_directory: Path, phases: Phases) -> dict[str, Any]:
    from orchestrator.data.preparation.prepare import ensure_prepared
    from orchestrator.models.loading import fetch_base

    def say(sentence: str) -> None:
        print(sentence, flush=True)

    cache = cache_folder(config.cluster.scratch)
    base_folder = fetch_base(config.model, cache=cache, say=say)
    phases.begin(phase.PREPARING, unit=phase.ROWS)
    prepared, *others = (
        ensure_prepared(
            data,
            tokenizer_folder=base_folder,
            cache=cache,
            seed=config.seeds.split,
            say=say,
            refuse_over_seconds=PREPARE_AT_MOST_SECONDS,
            advance=phases.advance,
            prepare_command=f"python -m orchestrator prepare {shlex.quote(str(run_directory))}",
        )
        for data in data_sets_of(config.stages[name]).values()
    )
    stage = config.stages[name]
    return {
        "content": content_digests(config, name, base_folder=base_folder),
        "base_folder": str(base_folder),
        "train": str(prepared.train),
        "evaluation": None if prepared.evaluation is None else str(prepared.evaluation),
        "sets": {name: str(other.train) for name, other in zip(stage.further_sets, others, strict=True)},
    }


def _die(folder: StageFolder, attempt: int, rank: int, error: BaseException) -> int:
    """Record this rank's cause of death in the attempt's files, in the log, and in the exit code."""
    known = isinstance(error, OrchestratorError)
    write_fault(folder, attempt, rank, error, _last_step(folder, attempt))
    if known:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    return error.exit_code if known else EXIT_DEFECT


def _last_step(folder: StageFolder, attempt: int) -> int | None:
    from orchestrator.metrics.jsonl import read_rows

    steps = [row["step"] for row in read_rows(folder.metrics) if row.get("attempt") == attempt]
    return max((step for step in steps if isinstance(step, int)), default=None)


def exit_process(code: int) -> None:
    """End the process without the interpreter's teardown, in which gloo ranks under ZeRO-3 abort occasionally."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_rank() -> int:
    """`main`, in a process that starts itself again where no guard does."""
    environment = dict(os.environ)
    code = main()
    if code == EXIT_WRITTEN and START not in environment:
        sys.stdout.flush()
        sys.stderr.flush()
        become_second_start(environment)
    return code


if __name__ == "__main__":
    exit_process(_run_rank())

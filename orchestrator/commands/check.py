"""The verbs that prove something: check and prepare before a run, audit after it, verify-resume. Must not import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.process import launch
from orchestrator.architecture.base_model import local_folder
from orchestrator.commands.plan_from_overrides import planned_run
from orchestrator.config.alignment import PolicyStage
from orchestrator.config.run import RunConfig, training_stages
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.parts import find_prepared
from orchestrator.errors import EXIT_DEFECT, EXIT_DONE, ConfigError
from orchestrator.execution.job_specs import job_spec, render
from orchestrator.execution.resume_proof import Running, print_proof
from orchestrator.execution.resume_proof import verify_resume as prove_resume
from orchestrator.execution.run_pipeline import freeze_run
from orchestrator.execution.slurm_submission import submit_preparation
from orchestrator.files.cache import cache_folder
from orchestrator.metrics.phases import AUDITING
from orchestrator.metrics.screen import busy
from orchestrator.planning.inspect_inputs import gather, validate_data
from orchestrator.planning.plan import make_plan
from orchestrator.run_folder.folder import RunFolder, StageFolder, read_json
from orchestrator.run_state.frozen import load_config
from orchestrator.text.plurals import counted

if TYPE_CHECKING:
    from orchestrator.data.ledger import Audit


def check(arguments: Sequence[str]) -> int:
    """The whole look before the spend: configuration, base, every row, masks, one tiny backward. Writes no run folder."""
    config, _ = planned_run(arguments)
    validate_data(config)
    return _examine("check", config, {"HF_HUB_OFFLINE": "1"})


def prepare(arguments: Sequence[str]) -> int:
    """Tokenises and packs the data of every stage, here or in a Slurm job without GPUs; a run then only maps it."""
    config, planned = planned_run(arguments)
    if config.launcher.kind == "slurm":
        freeze_run(config, planned, [render(config, stage) for stage in config.pipeline])
    return _prepare(config)


def prepare_run(run: RunFolder) -> int:
    """As `prepare`, for the frozen configuration of a run."""
    return _prepare(load_config(run))


def _prepare(config: RunConfig) -> int:
    if config.launcher.kind == "slurm":
        return submit_preparation(config)
    validate_data(config)
    return _examine("prepare", config, {})


def audit(run: RunFolder) -> int:
    """Proves from the ledgers that every epoch took every row exactly once."""
    config = load_config(run)
    codes = [_audit_stage(config, name, stage, run.stage(name)) for name, stage in _audited(config).items()]
    return max(codes, default=EXIT_DONE)


def verify_resume(arguments: Sequence[str], *, steps: int) -> int:
    """Trains a few steps straight, and again with a kill in between, and compares every step and tensor."""
    config, _ = planned_run(arguments)
    validate_data(config)
    proof = prove_resume(config, steps=steps, start=_start, say=print)
    print_proof(proof)
    return EXIT_DONE if proof.first_difference is None else EXIT_DEFECT


def _examine(verb: str, config: RunConfig, environment: dict[str, str]) -> int:
    """Runs the torch side on the frozen configuration, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps({"config": config.model_dump(mode="json")}), encoding="utf-8")
        argv = [sys.executable, "-m", "orchestrator.metrics.foreground", "preflight.main", verb, str(file)]
        return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1", **environment}, check=False).returncode


def _start(config: RunConfig, stage: str) -> AbstractContextManager[Running]:
    base, data = gather(config)
    script = render(config, stage)
    freeze_run(config, make_plan(config, base=base, data=data), [script])
    return launch(script, job_spec(config, stage))


def _prepared_rows(config: RunConfig, name: str, stage: TrainingStage, files: StageFolder) -> Path:
    """The rows of a stage: where they were, or where the same ones are in this machine's cache."""
    from orchestrator.data.prepared.meta import is_prepared

    recorded = Path(read_json(files.prepared)["train"])
    if is_prepared(recorded):
        return recorded
    cache = cache_folder(config.cluster.scratch)
    base = local_folder(config.model, cache)
    found = base and find_prepared(stage.data, tokenizer_folder=base, cache=cache, seed=config.seeds.split)
    if not found:
        raise ConfigError(
            f"{name}: its prepared rows are no longer in {recorded.parent}; type `prepare {files.root.parent}` to make them again"
        )
    return found[0]


def _audited(config: RunConfig) -> dict[str, TrainingStage]:
    """The stages that take prepared rows in a fixed order."""
    stages = {name: stage for name, stage in training_stages(config).items() if not isinstance(stage, PolicyStage)}
    return {name: stages[name] for name in config.pipeline if name in stages}


def _audited_sentence(found: Audit) -> str:
    """The verdict, over no more than was trained."""
    if not found.is_exact:
        return "NOT exact"
    if not found.whole_epochs:
        return "no row more than once; the first epoch was not finished, so not every row was taken"
    return "every row exactly once in each whole epoch, and none more than once in the last"


def _audit_stage(config: RunConfig, name: str, stage: TrainingStage, files: StageFolder) -> int:
    from orchestrator.data.ledger import audit as audit_ledger
    from orchestrator.data.order import make_order
    from orchestrator.data.prepared.folder import PreparedFolder

    if not files.samples.is_dir():
        raise ConfigError(f"{files.root}: no {files.samples.name}/ to audit; stages.{name}.ledger=true writes it")
    rows = PreparedFolder(_prepared_rows(config, name, stage, files))
    order = make_order(stage.data, lengths=rows.lengths, global_size=stage.batch.global_size, seed=config.seeds.data)
    omitted: list[int] = read_json(files.rollbacks)["omitted"] if files.rollbacks.exists() else []
    with busy(AUDITING):
        found = audit_ledger(
            files.samples, rows, steps_per_epoch=order.steps_per_epoch, skipped_steps=frozenset(omitted)
        )
    print(
        f"{name}: {counted(found.steps, 'step')} over {counted(found.rows, 'row')}, {counted(found.whole_epochs, 'whole epoch')}, "
        f"attempts {list(found.attempts)}, ranks {list(found.world_sizes)}, {counted(found.replayed_steps, 'step')} replayed"
    )
    for problem in found.problems:
        print(f"error: {name}: {problem}", file=sys.stderr)
    print(f"{name}: {_audited_sentence(found)}")
    return EXIT_DONE if found.is_exact else EXIT_DEFECT

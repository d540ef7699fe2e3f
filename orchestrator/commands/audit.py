"""The verb audit. Must not import torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from orchestrator.commands.preflight_process import rows_of_stage
from orchestrator.config.run import RunConfig, training_stages
from orchestrator.config.training import TrainingStage
from orchestrator.errors import EXIT_DEFECT, EXIT_DONE, ConfigError
from orchestrator.files.atomic import read_json
from orchestrator.metrics.phases import AUDITING
from orchestrator.metrics.screen import busy
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.frozen import load_config
from orchestrator.text.plurals import counted

if TYPE_CHECKING:
    from orchestrator.data.ledger import Audit


def audit(run: RunFolder) -> int:
    """Prove from the ledgers that every epoch used every row exactly once."""
    config = load_config(run)
    codes = [_audit_stage(config, name, stage, run.stage(name)) for name, stage in _audited(config).items()]
    return max(codes, default=EXIT_DONE)


def _audited(config: RunConfig) -> dict[str, TrainingStage]:
    """The stages that read prepared rows in a fixed order."""
    stages = {name: stage for name, stage in training_stages(config).items() if not stage.reads_prompts}
    return {name: stages[name] for name in config.pipeline if name in stages}


def _audited_sentence(found: Audit) -> str:
    """The verdict, limited to what was trained."""
    if not found.is_exact:
        return "NOT exact"
    if not found.whole_epochs:
        return "no row more than once; the first epoch was not finished, so not every row was used"
    return "every row exactly once in each whole epoch, and none more than once in the last"


def _audit_stage(config: RunConfig, name: str, stage: TrainingStage, files: StageFolder) -> int:
    from orchestrator.data.ledger import audit as audit_ledger
    from orchestrator.data.order import make_order
    from orchestrator.data.prepared.folder import PreparedFolder

    if not files.samples.is_dir():
        raise ConfigError(f"{files.root}: no {files.samples.name}/ to audit; stages.{name}.ledger=true writes it")
    rows = PreparedFolder(rows_of_stage(config, name, stage, files))
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

"""The verb export. Must not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from orchestrator.commands.generate import FOREGROUND
from orchestrator.commands.stage_choice import stage_of
from orchestrator.config.tuning import ADAPTER_TUNINGS
from orchestrator.errors import ConfigError
from orchestrator.files.manifest import MANIFEST
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.freeze import check_writable


def export(folder: RunFolder, *, stage: str | None, to: str | None, max_kl: float | None) -> int:
    """Write a folder ready to publish: adapter merged, measured, with a model card, re-opened."""
    stage = stage_of(folder, stage, "make a policy", ())
    if not folder.stage(stage).result.exists():
        raise ConfigError(f"{stage} is not done: there is no {folder.stage(stage).result}; see `status {folder.root}`")
    _refuse_what_cannot_be_merged(folder, stage)
    target = Path(to or folder.root / "export").expanduser().resolve()
    if target.exists() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise ConfigError(f"--to {target}: it exists and was not made by export; give a new folder")
    check_writable(target, advice="type --to FOLDER with a folder of yours")
    arguments = [] if max_kl is None else ["--max-kl", str(max_kl)]
    argv = [
        sys.executable,
        "-m",
        FOREGROUND,
        "merging.export",
        str(folder.run),
        "--stage",
        stage,
        "--to",
        str(target),
        *arguments,
    ]
    return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode


def _refuse_what_cannot_be_merged(folder: RunFolder, stage: str) -> None:
    from orchestrator.config.tuning_rules import why_no_merge
    from orchestrator.run_state.frozen import load_config

    tuning = load_config(folder).tuning
    reason = why_no_merge(tuning) if isinstance(tuning, ADAPTER_TUNINGS) else None
    if reason is not None:
        raise ConfigError(f"export: {reason}; publish the folder {folder.stage(stage).artifact} itself")

"""Starts the programs that inspect data with torch, in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator import __version__
from orchestrator.architecture.base_model import local_folder
from orchestrator.config.run import RunConfig
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.parts import find_prepared
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.cache import cache_folder
from orchestrator.run_folder.folder import RunFolder, StageFolder


def run_preflight(verb: str, config: RunConfig, environment: dict[str, str]) -> int:
    """Run the torch side on the frozen configuration, in a separate process."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        file = RunFolder(Path(folder)).run
        write_json(file, {"orchestrator": __version__, "config": config.model_dump(mode="json")})
        argv = [sys.executable, "-m", "orchestrator.metrics.foreground", "preflight.main", verb, str(file)]
        return subprocess.run(argv, env={**os.environ, "PYTHONSAFEPATH": "1", **environment}, check=False).returncode


def rows_of_stage(config: RunConfig, name: str, stage: TrainingStage, files: StageFolder) -> Path:
    """The prepared rows of a stage: at their recorded path, or the same ones in this machine's cache."""
    from orchestrator.data.prepared.meta import is_prepared

    recorded = Path(read_json(files.prepared)["train"])
    if is_prepared(recorded):
        return recorded
    cache = cache_folder(config.cluster.scratch)
    base = local_folder(config.model, cache)
    found = base and find_prepared(stage.data, tokenizer_folder=base, cache=cache, seed=config.seeds.split)
    if not found:
        raise ConfigError(
            f"{name}: its prepared rows are no longer in {recorded.parent}; type `prepare {files.root.parent}` to rebuild them"
        )
    return found[0]

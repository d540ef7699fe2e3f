"""Locates the base and the prepared rows of a finished stage: recorded paths are a first guess, digests decide."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config.run import RunConfig
from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.data.prepared.meta import is_prepared
from orchestrator.errors import DataError, ModelError, OrchestratorError
from orchestrator.files.atomic import read_json
from orchestrator.files.cache import cache_folder
from orchestrator.models.loading import fetch_base
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.content_digests import base_digest


def find_base_folder(config: RunConfig, run: RunFolder, stage: str) -> Path:
    """The folder of the base that a finished stage was trained on. ModelError if it is missing or has changed."""
    result = read_json(run.stage(stage).result)
    wanted: str | None = result.get("digests", {}).get("base")
    recorded = Path(result["base"]["folder"])
    folder = recorded if recorded.is_dir() else _fetched(config, recorded)
    if wanted is not None and base_digest(folder) != wanted:
        raise ModelError(
            f"model.base: {folder} is not the base that {stage} was trained on: its weights or config.json differ; "
            "restore the old ones"
        )
    return folder


def find_rows(config: RunConfig, run: RunFolder, stage: str, *, base_folder: Path) -> Path:
    """Held-out rows of a stage, or else its training rows; prepared again if the cache lost them."""
    note = read_json(run.stage(stage).prepared) if run.stage(stage).prepared.exists() else {}
    recorded = note.get("evaluation") or note.get("train")
    if recorded is not None and is_prepared(Path(recorded)):
        return Path(recorded)
    try:
        prepared = ensure_prepared(
            config.stages[stage].data,
            tokenizer_folder=base_folder,
            cache=cache_folder(config.cluster.scratch),
            seed=config.seeds.split,
            say=print,
        )
    except DataError as error:
        lost = f"stages.{stage}: its prepared rows are no longer in the cache, and cannot be prepared again"
        raise DataError([lost, *error.problems]) from None
    return prepared.evaluation or prepared.train


def _fetched(config: RunConfig, recorded: Path) -> Path:
    try:
        return fetch_base(config.model, cache=cache_folder(config.cluster.scratch), say=print)
    except OrchestratorError as error:
        raise ModelError([f"the base folder {recorded}, recorded in result.json, is gone", *error.problems]) from None

"""Whether the data of a run still has to be prepared, and whether a Slurm job should do it. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.architecture.base_model import local_folder
from orchestrator.config.run import RunConfig, data_sets_of
from orchestrator.data.prepared.parts import find_prepared
from orchestrator.data.sources.validate import inspect
from orchestrator.files.cache import cache_folder
from orchestrator.planning.inspect_inputs import sources_of

MIB = 2**20


def needs_job(config: RunConfig, stages: Iterable[str]) -> bool:
    """Whether a stage's data is not prepared here and is too large (or not here at all) for the first rank to prepare."""
    return any(_is_large(config, name) and not is_prepared(config, name) for name in stages)


def is_prepared(config: RunConfig, stage: str) -> bool:
    """Whether the rows of a stage are already prepared in the cache that its job will use."""
    cache = cache_folder(config.cluster.scratch)
    folder = local_folder(config.model, cache)
    if folder is None:
        return False
    return all(
        find_prepared(data, tokenizer_folder=folder, cache=cache, seed=config.seeds.split) is not None
        for data in data_sets_of(config.stages[stage]).values()
    )


def _is_large(config: RunConfig, stage: str) -> bool:
    looks = [inspect(source, field=key) for key, source in sources_of(stage, config.stages[stage]).items()]
    is_elsewhere = any(look.rows is None for look in looks)
    return is_elsewhere or sum(look.bytes for look in looks) > config.cluster.prepare.over_mib * MIB

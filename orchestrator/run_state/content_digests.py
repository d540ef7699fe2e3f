"""Digests of the inputs of a stage: base, tokenizer, template, data files and code. Must not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from orchestrator import __version__
from orchestrator.architecture.base_model import local_folder
from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.config.run import RunConfig, data_sets_of
from orchestrator.data.prepared.key import template_digest, tokenizer_digest
from orchestrator.data.sources.locate import held_out_source, locate
from orchestrator.errors import DataError, ModelError
from orchestrator.files.atomic import read_json
from orchestrator.files.cache import cache_folder
from orchestrator.files.hash_cache import FileHashes
from orchestrator.files.manifest import file_digest
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.soup_members import manifests_elsewhere

SAMPLES = 64
SAMPLE_BYTES = 4096
"""Weights are too large to be hashed at each start: both ends and this many samples between them are read."""
SHARED = ("base", "tokenizer", "template")
"""Digests that a stage and the stages it reads must share."""


def content_digests(config: RunConfig, name: str, *, base_folder: Path) -> dict[str, str]:
    """Digests of everything besides settings that decides a stage's result, by name; `data` is missing if its files are
    not on this machine.
    """
    data, *others = data_sets_of(config.stages[name]).values()
    hashes = FileHashes(cache_folder(config.cluster.scratch) / "data")
    found = {
        "base": base_digest(base_folder),
        "tokenizer": tokenizer_digest(base_folder, hashes),
        "template": template_digest(data, base_folder),
        "code": f"{__version__}+{_code_digest()}",
    }
    files = _data_digest([*_sources(data), *(other.train for other in others)], hashes)
    hashes.save()
    found |= {
        f"member {number}": file_digest(file) for number, file in enumerate(manifests_elsewhere(config.stages[name]))
    }
    return found if files is None else {**found, "data": files}


def changed_content(config: RunConfig, run: RunFolder, name: str) -> list[str]:
    """Inputs that changed since the stage finished. A code change alone does not invalidate it."""
    recorded: Mapping[str, str] = read_json(run.stage(name).result).get("digests", {})
    try:
        base_folder = local_folder(config.model, cache_folder(config.cluster.scratch))
        if base_folder is None or not recorded:
            return []
        now = content_digests(config, name, base_folder=base_folder)
    except (DataError, ModelError):  # a missing input cannot have changed the finished result
        return []
    members = [key for key in now if key.startswith("member ")]
    return [key for key in (*SHARED, "data", *members) if key in now and key in recorded and now[key] != recorded[key]]


def base_digest(folder: Path) -> str:
    """sha256 over config.json, and over name, size and samples of every file of weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with open(file, "rb") as handle:
            for sample in range(SAMPLES + 1):
                handle.seek(max(0, size - SAMPLE_BYTES) * sample // SAMPLES)
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _data_digest(sources: Sequence[SourceConfig], hashes: FileHashes) -> str | None:
    digest = hashlib.sha256()
    for source in sources:
        files = locate(source, field="data")
        if files is None:
            return None
        for file in files:
            digest.update(f"{hashes.of(file)}\n".encode())
    return digest.hexdigest()


def _sources(data: DataConfig) -> list[SourceConfig]:
    held_out = held_out_source(data)
    return [data.train, *data.mix, *([] if held_out is None else [held_out])]


@lru_cache(maxsize=1)
def _code_digest() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]

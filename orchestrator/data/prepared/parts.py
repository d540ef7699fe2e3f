"""The sets of rows that a data configuration asks for, with their files, formats and keys; reads only the first row.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.data import DataConfig, DataFormat, SourceConfig
from orchestrator.data.formats.columns import KINDS
from orchestrator.data.prepared.key import PreparedKey, prepared_key
from orchestrator.data.prepared.meta import EVALUATION, is_prepared
from orchestrator.data.sources.locate import held_out_source, locate, splits_train
from orchestrator.data.sources.validate import settle_format
from orchestrator.errors import DataError
from orchestrator.files.hash_cache import FileHashes

Fetch = Callable[[SourceConfig, str], tuple[Path, ...]]
"""(source, field) -> its files, downloaded if missing."""


@dataclass(frozen=True, slots=True)
class PreparedSplit:
    """One set of rows to prepare: train (with the rows split off from it, where `splits`) or evaluation."""

    role: Literal["train", "evaluation"]
    sources: tuple[SourceConfig, ...]
    files: tuple[tuple[Path, ...], ...]
    formats: tuple[DataFormat, ...]
    splits: bool
    key: Mapping[str, Any]
    digest: str

    @property
    def all_files(self) -> tuple[Path, ...]:
        return tuple(path for files in self.files for path in files)


def plan_parts(
    config: DataConfig, *, tokenizer_folder: Path, cache: Path, seed: int, fetch: Fetch | None = None
) -> tuple[PreparedSplit, ...]:
    """Train, and evaluation if it has its own files. Raises DataError if a source is missing."""
    hashes = FileHashes(cache)
    splits = splits_train(config)
    train = _part("train", (config.train, *config.mix), config, tokenizer_folder, seed, hashes, fetch, splits=splits)
    parts = [train]
    held_out = held_out_source(config)
    if held_out is not None:
        parts.append(_part("evaluation", (held_out,), config, tokenizer_folder, seed, hashes, fetch, splits=False))
        kinds = KINDS[train.formats[0]], KINDS[parts[1].formats[0]]
        if kinds[0] != kinds[1]:
            raise DataError(
                f"data.train holds rows of format {train.formats[0]}, but data.eval of {parts[1].formats[0]}"
            )
    hashes.save()
    return tuple(parts)


def find_prepared(
    config: DataConfig, *, tokenizer_folder: Path, cache: Path, seed: int
) -> tuple[Path, Path | None] | None:
    """The folders of train and evaluation if both are already prepared, else None. Reads no row.

    `cache` is the tool's cache folder. With them the plan knows rows and steps exactly, and rows need no reading again.
    """
    root = cache / "data"
    try:
        parts = plan_parts(config, tokenizer_folder=tokenizer_folder, cache=root, seed=seed)
    except DataError:
        return None
    if not all(is_prepared(root / part.digest) for part in parts):
        return None
    return prepared_folders(root, parts)


def prepared_folders(root: Path, parts: tuple[PreparedSplit, ...]) -> tuple[Path, Path | None]:
    """Where the rows of train and of the evaluation are, or will be."""
    first, *others = parts
    train = root / first.digest
    if others:
        return train, root / others[0].digest
    return train, train / EVALUATION if first.splits else None


def _part(
    role: Literal["train", "evaluation"],
    sources: tuple[SourceConfig, ...],
    config: DataConfig,
    tokenizer_folder: Path,
    seed: int,
    hashes: FileHashes,
    fetch: Fetch | None,
    *,
    splits: bool,
) -> PreparedSplit:
    field = "data.train" if role == "train" else "data.eval"
    files = tuple(_files(source, field, fetch) for source in sources)
    formats: tuple[DataFormat, ...] = tuple(
        settle_format(source, paths, field=field) for source, paths in zip(sources, files, strict=True)
    )
    if len({KINDS[data_format] for data_format in formats}) > 1:
        raise DataError(f"{field} mixes formats that cannot share a batch: {', '.join(formats)}")
    key: PreparedKey = prepared_key(
        config,
        tuple(zip(sources, files, formats, strict=True)),
        role=role,
        splits=splits,
        tokenizer_folder=tokenizer_folder,
        seed=seed,
        hashes=hashes,
    )
    return PreparedSplit(role, sources, files, formats, splits, key.components, key.digest)


def _files(source: SourceConfig, field: str, fetch: Fetch | None) -> tuple[Path, ...]:
    files = locate(source, field=field)
    if files is not None:
        return files
    if fetch is None:
        raise DataError(f"{field}.path={source.path} is not on this machine: `prepare` fetches a hub data set")
    return fetch(source, field)

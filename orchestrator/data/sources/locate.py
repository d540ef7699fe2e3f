"""Locates the files of a data set. Must not import torch or datasets."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.config.demonstration import DEMONSTRATION, DEMONSTRATIONS
from orchestrator.data.sources.readers import SUFFIXES, FileKind, file_kind
from orchestrator.errors import DataError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def held_out_source(config: DataConfig) -> SourceConfig | None:
    """The files of the evaluation, or None if it is `none` or a split of train."""
    held_out = config.eval
    path = held_out.path
    if path == "auto" and config.train.path in DEMONSTRATIONS and not config.mix:
        path = str(DEMONSTRATION / DEMONSTRATIONS[config.train.path][1])
    if path in ("none", "auto"):
        return None
    return SourceConfig(
        path=path,
        format=held_out.format,
        split=held_out.split,
        subset=held_out.subset,
        revision=held_out.revision,
        columns=held_out.columns,
        unlabelled=held_out.unlabelled,
        no_label=held_out.no_label,
        rows=None,
        weight=None,
    )


def splits_train(config: DataConfig) -> bool:
    """Whether the evaluation rows are split off from train."""
    return config.eval.path == "auto" and held_out_source(config) is None


def locate(source: SourceConfig, *, field: str) -> tuple[Path, ...] | None:
    """The files of a source in a fixed order, or None for a hub id that is not on this machine. Raises DataError."""
    if source.path in DEMONSTRATIONS:
        return (DEMONSTRATION / DEMONSTRATIONS[source.path][0],)
    path = Path(source.path).expanduser()
    if path.is_file():
        known_kind(path)
        return (path.absolute(),)
    if path.is_dir():
        return _folder_files(path.absolute(), source.split, field=field)
    if glob.has_magic(source.path):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = tuple(sorted(Path(name).absolute() for name in names if Path(name).is_file()))
        if not files:
            raise DataError(f"{field}.path={source.path} matches no file")
        for file in files:
            known_kind(file)
        return files
    if HUB_ID.match(source.path) and path.suffix not in SUFFIXES:
        cached = cached_hub_folder(source.path, source.revision)
        return None if cached is None else hub_files(cached, source, field=field)
    raise DataError(
        f"{field}.path={source.path} does not exist: give a file, a glob, a folder or a hub id (owner/name)"
    )


def cached_hub_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub data set in the local cache, or None."""
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / ("datasets--" + name.replace("/", "--"))
    wanted = revision or "main"
    reference = root / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    folder = root / "snapshots" / commit
    return folder if folder.is_dir() else None


def hub_files(folder: Path, source: SourceConfig, *, field: str) -> tuple[Path, ...]:
    """The files of the wanted subset and split in a downloaded hub data set. Raises DataError."""
    base = folder / source.subset if source.subset and (folder / source.subset).is_dir() else folder
    return _folder_files(base, source.split, field=field)


def _folder_files(folder: Path, split: str | None, *, field: str) -> tuple[Path, ...]:
    """Data files below a folder; of the named split, or of `train` if file names mention splits."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES and not _is_about(p))
    if not found:
        raise DataError(f"{field}.path={folder} holds no data file ({', '.join(SUFFIXES)}, also .gz)")
    splits = {name: [p for p in found if _belongs(p.relative_to(folder), name)] for name in _split_names(found, folder)}
    wanted = split if split is not None else "train" if "train" in splits else None
    if wanted is None:
        return tuple(found)
    if wanted not in splits:
        raise DataError(f"{field}.split={wanted} is not in {folder}: found {', '.join(splits) or 'no named splits'}")
    return tuple(splits[wanted])


_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|dev|eval|held_out)(?=[/_.-]|$)")


def _split_names(files: list[Path], folder: Path) -> list[str]:
    names = {match.group(1) for p in files if (match := _SPLIT.search(p.relative_to(folder).as_posix()))}
    return sorted(names)


def _belongs(relative: Path, split: str) -> bool:
    match = _SPLIT.search(relative.as_posix())
    return match is not None and match.group(1) == split


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _is_about(path: Path) -> bool:
    """Whether a file only describes a data set (as the `datasets` library writes next to its rows)."""
    return (
        path.name in ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
        or path.name[0] == "."
    )


def known_kind(path: Path) -> FileKind:
    """The kind of a data file. Raises DataError for an unknown one."""
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path} is of an unknown kind: {', '.join(SUFFIXES)} are known, also with .gz")
    return kind

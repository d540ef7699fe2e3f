"""Finds a base model without torch: a local folder, a Python package, or the hub; reports what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.architecture.read import read_architecture
from orchestrator.architecture.tokenizer_files import VOCABULARY_FILES
from orchestrator.config.model import Architecture, ModelConfig
from orchestrator.errors import ModelError
from orchestrator.files.hash_cache import FileHashes

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class Base:
    """Where the base model comes from."""

    source: Literal["folder", "package", "hub"]
    location: str
    """Folder, name of the distribution, or hub id."""
    architecture: Architecture | None
    """None if it is only known after a download."""


def find_base(model: ModelConfig) -> Base:
    """Try a local folder, then the preset's package, then the hub. An incomplete folder is refused."""
    if looks_like_folder(model.base):
        folder = Path(model.base).expanduser()
        problems = folder_problems(folder, model.base)
        if problems:
            raise ModelError(problems)
        return Base(source="folder", location=str(folder.resolve()), architecture=read_architecture(folder))
    preset = model.preset if model.preset is not None and model.preset.base == model.base else None
    architecture = preset.architecture if preset is not None else _cached_architecture(model)
    if preset is not None and preset.package is not None and package_gguf(preset.package) is not None:
        return Base(source="package", location=preset.package, architecture=architecture)
    return Base(source="hub", location=model.base, architecture=architecture)


def looks_like_folder(base: str) -> bool:
    """Whether the text is an existing path, or written like one."""
    path = Path(base).expanduser()
    return path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1


def folder_problems(folder: Path, given: str) -> list[str]:
    """Missing parts of a model folder, one sentence each."""
    if not folder.is_dir():
        return [
            f"model.base: {given} is not a folder; give a folder with config.json, weights and tokenizer, or a hub id"
        ]
    problems: list[str] = []
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"model.base: {folder} has no config.json")
    except OSError as error:
        problems.append(f"model.base: {folder / 'config.json'} cannot be read: {error.strerror}")
    except ValueError as error:
        problems.append(f"model.base: {folder / 'config.json'} is damaged: {error}")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf") for file in folder.glob(pattern))
        hint = f"; it has {', '.join(others[:3])}, which are not read: convert them to safetensors" if others else ""
        problems.append(f"model.base: {folder} has no weights ({' or '.join(WEIGHT_FILES)}){hint}")
    problems += _shard_problems(folder)
    problems += [
        f"model.base: {fault}" for file in sorted(folder.glob("model*.safetensors")) for fault in _tensor_faults(file)
    ]
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        problems.append(f"model.base: {folder} has no tokenizer (one of {', '.join(VOCABULARY_FILES)})")
    return problems


def package_gguf(package: str) -> Path | None:
    """The GGUF file that an installed distribution carries, found without importing it."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        return None
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    return files[0] if files else None


def dequantised_folder(gguf: Path, cache: Path) -> Path:
    """Where a GGUF file's weights are, or will be, as safetensors: named by the hash of the file, which is cached."""
    hashes = FileHashes(cache / "data")
    digest = hashes.of(gguf)
    hashes.save()
    return cache / "models" / f"{gguf.stem}-{digest[:16]}"


def local_folder(model: ModelConfig, cache: Path) -> Path | None:
    """The folder of the base if it is already on this machine; None if it must be converted or downloaded first."""
    base = find_base(model)
    if base.source == "folder":
        return Path(base.location)
    if base.source == "package":
        gguf = package_gguf(base.location)
        assert gguf is not None, "find_base saw it"
        if not (cache / "models").is_dir():
            return None
        folder = dequantised_folder(gguf, cache)
        return folder if folder.is_dir() else None
    return next(iter(_snapshots(model)), None)


def hub_is_offline() -> bool:
    """Whether the user disabled the hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _shard_problems(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"model.base: {index} is damaged: {error}"]
    return [f"model.base: {folder} lacks the shard {shard}" for shard in shards if not (folder / shard).is_file()]


def _tensor_faults(file: Path) -> list[str]:
    """Check the header of a safetensors file against its size; the tensors themselves are not read."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        start = content.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            is_pointer = start.startswith(b"version ")
            return [
                f"{file} is a Git LFS pointer: type git lfs pull"
                if is_pointer
                else f"{file} is truncated or not a safetensors file"
            ]
        text = content.read(length)
    try:
        header = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return [f"{file} is damaged: its header is not that of a safetensors file"]
    expected = 8 + length + end
    return [] if size == expected else [f"{file} has {size} bytes, its header implies {expected}: it was truncated"]


def _cached_architecture(model: ModelConfig) -> Architecture | None:
    snapshot = next(iter(_snapshots(model)), None)
    return None if snapshot is None else read_architecture(snapshot)


def _snapshots(model: ModelConfig) -> list[Path]:
    """Folders of earlier downloads in the hub's cache; never uses the network."""
    home = Path(
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
    )
    snapshots = home / f"models--{model.base.replace('/', '--')}" / "snapshots"
    return [config.parent for config in sorted(snapshots.glob("*/config.json"))] if snapshots.is_dir() else []

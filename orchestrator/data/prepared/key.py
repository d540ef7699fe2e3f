"""The key of prepared rows: everything that decides them, readable, and its digest. Must not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.architecture.tokenizer_files import TEMPLATE_FILES, TOKENIZER_FILES
from orchestrator.config.data import DataConfig, DataFormat, SourceConfig
from orchestrator.data.prepared.meta import DATA_VERSION, META
from orchestrator.errors import DataError
from orchestrator.files.hash_cache import FileHashes

CLASSIFICATION_VERSION = 1
"""Like DATA_VERSION, only for rows of format classification."""


@dataclass(frozen=True, slots=True)
class PreparedKey:
    """Everything that decides a set of prepared rows, by name, and its digest."""

    components: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.components, sort_keys=True).encode()).hexdigest()[:32]


def prepared_key(
    config: DataConfig,
    sources: tuple[tuple[SourceConfig, tuple[Path, ...], DataFormat], ...],
    *,
    role: str,
    splits: bool,
    tokenizer_folder: Path,
    seed: int,
    hashes: FileHashes,
) -> PreparedKey:
    """The key of one set of rows; with `splits` the rows held out of train belong to it."""
    is_drawn = any(source.rows is not None or source.weight is not None for source, _, _ in sources)
    return PreparedKey(
        {
            "role": role,
            "data": [[hashes.of(file) for file in files] for _, files, _ in sources],
            "format": [[data_format, *_reading(source, data_format)] for source, _, data_format in sources],
            "mixture": [[source.rows, source.weight] for source, _, _ in sources],
            "split": {"fraction": config.eval.fraction, "max_rows": config.eval.max_rows} if splits else None,
            "seed": seed if splits or is_drawn else None,
            "tokenizer": tokenizer_digest(tokenizer_folder, hashes),
            "template": template_digest(config, tokenizer_folder),
            "template_date": config.template_date,
            "max_length": config.max_length,
            "loss_on": config.loss_on,
            "packing": config.packing,
            "deduplicate": config.deduplicate,
            "code": DATA_VERSION,
        }
    )


def _reading(source: SourceConfig, data_format: DataFormat) -> list[Any]:
    """What decides how rows of a format are read."""
    columns = dict(sorted(source.columns.items()))
    if data_format != "classification":
        return [columns]
    return [columns, source.unlabelled, source.no_label, CLASSIFICATION_VERSION]


def changed_components(cache: Path, key: PreparedKey) -> tuple[str, ...] | None:
    """Differences from the most similar set in the cache, as `name: there -> here`; None if the cache is empty."""
    nearest: tuple[str, ...] | None = None
    for path in cache.glob(f"*/{META}"):
        try:
            other = cast("dict[str, Any]", json.loads(path.read_text())["key"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if other.get("role") != key.components["role"]:
            continue
        names = [name for name in key.components if json.dumps(other.get(name)) != json.dumps(key.components[name])]
        if nearest is None or len(names) < len(nearest):
            nearest = tuple(_difference(name, other.get(name), key.components[name]) for name in names)
    return nearest


def _difference(name: str, there: object, here: object) -> str:
    short = all(len(json.dumps(value)) <= 40 for value in (there, here)) and name not in (
        "data",
        "tokenizer",
        "template",
    )
    return f"{name}: {there} there, {here} here" if short else name


def tokenizer_digest(folder: Path, hashes: FileHashes) -> str:
    """sha256 over a tokenizer's files and settings, without its chat template."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"{name}:{hashes.of(folder / name)}\n".encode())
    config = _tokenizer_config(folder)
    config.pop("chat_template", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def template_digest(config: DataConfig, folder: Path) -> str:
    """sha256 of the chat template in use. Raises DataError if a configured one is not a file."""
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        if not path.is_file():
            raise DataError(f"chat_template={config.chat_template} is not a file")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for name in TEMPLATE_FILES:
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(_tokenizer_config(folder).get("chat_template")).encode()).hexdigest()


def has_template(config: DataConfig, folder: Path) -> bool:
    """Whether conversations are rendered by the tokenizer's own template or a configured one."""
    files = any((folder / name).is_file() for name in TEMPLATE_FILES)
    return config.chat_template is not None or files or bool(_tokenizer_config(folder).get("chat_template"))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}

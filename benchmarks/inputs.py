"""What several benchmarks read: rows with the default data settings, and the small base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.data import DataConfig

ROOT = Path(__file__).resolve().parent.parent


def data_config(path: Path, columns: dict[str, str], **changes: Any) -> DataConfig:
    values: dict[str, Any] = yaml.safe_load((ROOT / "conf/data/base.yaml").read_text())
    values["train"] |= {"path": str(path), "columns": columns}
    values["eval"]["path"] = "none"
    return DataConfig.model_validate(values | changes)


def base_folder() -> Path:
    """SmolLM2-135M, dequantised once."""
    from orchestrator.composition.compose import examine
    from orchestrator.files.cache import cache_folder
    from orchestrator.models.loading import fetch_base

    config = examine(["+experiment=llama_lora"]).config
    return fetch_base(config.model, cache=cache_folder(None), say=print)

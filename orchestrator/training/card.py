"""The model card of a published folder, from what the run's own files tell. Pure; must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from orchestrator import __version__
from orchestrator.config.run import RunConfig


def write_card(
    config: RunConfig,
    results: Mapping[str, Mapping[str, Any]],
    *,
    ways: Sequence[Mapping[str, Any]],
    price_per_hour: float | None,
) -> str:
    """Markdown with the front matter that hubs read. `results` are the result.json of the stages before, in order."""
    front = {
        "base_model": config.model.base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orchestrator", config.tuning.method],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", f"# {config.name}", ""]
    method = (
        config.tuning.method
        if config.quantization.scheme == "none"
        else f"{config.tuning.method} on a {config.quantization.scheme} base"
    )
    lines += [
        f"{config.model.base}, fine-tuned ({method}) by the orchestrator {__version__}; merged, measured and re-opened.",
        "",
        "## Stages",
        "",
    ]
    lines += [
        "| stage | kind | steps | trained tokens | held-out loss before | after | data | hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_stage_line(config, name, result) for name, result in results.items()]
    seconds = sum(float(result.get("seconds") or 0.0) for result in results.values())
    hours = seconds / 3600 * config.world_size
    price = "" if price_per_hour is None else f", {hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    lines += ["", f"Cost: {hours:.2f} device hours on {config.world_size} device(s){price}.", "", "## Merge", ""]
    lines += ["| way | KL to the trained model, nats a token | same next token | loss |", "|---|---|---|---|"]
    lines += [f"| {way['name']} | {way['kl']:.2e} | {way['agreement']:.2%} | {way['loss']:.4f} |" for way in ways]
    lines += ["", "## Digests", ""]
    lines += [
        f"- {name}: settings and inputs `{str(result.get('digest', ''))[:16]}`, artifact `{str(result['artifact']['manifest_sha256'])[:16]}`"
        for name, result in results.items()
    ]
    return "\n".join(lines) + "\n"


def _stage_line(config: RunConfig, name: str, result: Mapping[str, Any]) -> str:
    source = config.stages[name].data.train.path.rstrip("/").rsplit("/", 1)[-1]
    hours = float(result.get("seconds") or 0.0) / 3600
    cells = [
        name,
        result["kind"],
        result.get("steps", ""),
        result.get("trained_tokens", ""),
        _number(result.get("eval_loss_before")),
        _number(result.get("eval_loss_after")),
        source,
        f"{hours:.2f}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"

"""Model cards: of an artifact, and of a merged folder to publish, from the same facts of the run. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator import __version__
from orchestrator.architecture.base_model import looks_like_folder
from orchestrator.config.run import RunConfig
from orchestrator.data.prepared.meta import Meta
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.loading_code import loading_lines
from orchestrator.text.durations import seconds_words

CARD = "README.md"
TRAINED_BY = {
    "sft": "supervised fine-tuning",
    "dpo": "preference optimisation",
    "grpo": "reinforcement learning",
    "reward": "preference pairs (a reward model)",
    "classify": "labelled texts (a classifier)",
    "self_training": "self-training (a classifier)",
    "interpolate": "interpolation of two models",
    "soup": "a soup of several models",
}
MAIN_KEYS = ("optimizer", "schedule", "batch", "max_steps", "epochs")
"""Keys of a training stage that the card lists."""
LICENCE = (
    "Not stated: add `license:` to the front matter above once you have checked the licences of the base model and of "
    "the training data, which both apply."
)


def artifact_card(
    config: RunConfig, name: str, result: Mapping[str, Any], *, folder: Path, train: Meta | None, held_out: Meta | None
) -> str:
    """The README.md of a stage's artifact, once it is proven. `train` and `held_out` describe the prepared rows."""
    kind, base = ArtifactKind(result["artifact"]["kind"]), base_name(config)
    lines = [
        *_front(config, kind),
        f"# {config.name}, stage {name}",
        "",
        f"{kind.heading.capitalize()} of {base}, made by {TRAINED_BY.get(str(result['kind']), str(result['kind']))} "
        f"({config.tuning.method}) with orchestrator {__version__}.",
        "",
        *_how_to_load(kind, base=_loadable_base(config, result), folder=folder),
        "",
        "## Training",
        "",
        *_table(
            {
                "base model": base,
                "data": _source_name(config, name),
                "rows": _rows_sentence(train, held_out),
                "steps": result.get("steps"),
                "trained tokens": result.get("trained_tokens"),
                "time": seconds_words(float(result.get("seconds") or 0.0)),
            }
        ),
        "",
        "```yaml",
        yaml.safe_dump(_main_keys(config, name), sort_keys=False, default_flow_style=None, width=100).strip(),
        "```",
        "",
        "## Results",
        "",
        *_table(_results(result)),
        "",
        "## Licence",
        "",
        LICENCE,
    ]
    return "\n".join(lines) + "\n"


def base_name(config: RunConfig) -> str:
    """The base without this machine's folders."""
    return Path(config.model.base).name if looks_like_folder(config.model.base) else config.model.base


def _how_to_load(kind: ArtifactKind, *, base: str, folder: Path) -> list[str]:
    return [
        "## Load it",
        "",
        "Run it inside this folder, or replace `.` with the folder's path.",
        "",
        "```python",
        *loading_lines(".", kind=kind, base=base, folder=folder),
        "```",
    ]


def _front(config: RunConfig, kind: ArtifactKind) -> list[str]:
    """The front matter that model hubs read."""
    scores = kind.is_classifier or kind.is_reward
    front = {
        "base_model": base_name(config),
        "base_model_relation": "adapter" if kind.is_adapter else "finetune",
        "library_name": "peft" if kind.is_adapter else "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["orchestrator", config.tuning.method],
    }
    return ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", ""]


def _loadable_base(config: RunConfig, result: Mapping[str, Any]) -> str:
    """A hub id if the base is one, else a folder of this machine."""
    preset = config.model.preset
    is_packaged = preset is not None and preset.base == config.model.base and preset.package is not None
    is_local = is_packaged or looks_like_folder(config.model.base)
    return str(result["base"]["folder"]) if is_local else config.model.base


def _rows_sentence(train: Meta | None, held_out: Meta | None) -> str | None:
    if train is None:
        return None
    kept_apart = "none held out" if held_out is None else f"{held_out.statistics.units:,} held out"
    return f"{train.statistics.units:,} trained on ({train.format}), {kept_apart}"


def _main_keys(config: RunConfig, name: str) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    stage: dict[str, Any] = values["stages"][name]
    keys = {key: values[key] for key in ("tuning", "quantization", "seeds")} | {"dtype": config.model.dtype}
    if config.stages[name].trains:
        keys |= {key: stage[key] for key in MAIN_KEYS if stage.get(key) is not None}
    return keys


def _results(result: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out metrics, and the proof of the files."""
    found: dict[str, Any] = {
        "held-out loss before": _number(result.get("eval_loss_before")),
        "held-out loss after": _number(result.get("eval_loss_after")),
    }
    classified: dict[str, Any] = result.get("classification") or {}
    judged: dict[str, Any] = classified.get("held_out") or {}
    found |= {f"held-out {key}": _number(value) for key, value in judged.items() if isinstance(value, float)}
    if "reward_report" in result and result["reward_report"] is not None:
        found["accuracy on held-out pairs"] = _number(result["reward_report"]["accuracy"])
    if "proof" in result:
        proof = result["proof"]
        found["proof"] = (
            f"re-opened in a fresh process, the files score {proof['reopened_loss']:.5f} on {proof['rows']} rows; the trainer scored "
            f"{proof['loss']:.5f}"
        )
    return found


def _table(facts: Mapping[str, Any]) -> list[str]:
    """A two-column table of the known facts."""
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    shown = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in known.items()}
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())]


def _source_name(config: RunConfig, name: str) -> str:
    """The data set without this machine's folders; a hub id unchanged."""
    path = config.stages[name].data.train.path.rstrip("/")
    return path.rsplit("/", 1)[-1] if looks_like_folder(path) else path


def write_card(
    config: RunConfig,
    results: Mapping[str, Mapping[str, Any]],
    *,
    ways: Sequence[Mapping[str, Any]],
    price_per_hour: float | None,
    folder: Path,
) -> str:
    """The README.md of a merged folder. `results` are the result.json of the stages before it, in order; `folder` has the tokenizer."""
    lines = [*_front(config, ArtifactKind.MODEL), f"# {config.name}", ""]
    method = (
        config.tuning.method
        if config.quantization.scheme == "none"
        else f"{config.tuning.method} on a {config.quantization.scheme} base"
    )
    lines += [
        f"{base_name(config)}, fine-tuned ({method}) by the orchestrator {__version__}; merged, measured and re-opened.",
        "",
        *_how_to_load(ArtifactKind.MODEL, base="", folder=folder),
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
    lines += ["| way | KL to the trained model, nats per token | same next token | loss |", "|---|---|---|---|"]
    lines += [f"| {way['name']} | {way['kl']:.2e} | {way['agreement']:.2%} | {way['loss']:.4f} |" for way in ways]
    lines += ["", "## Digests", ""]
    lines += [
        f"- {name}: settings and inputs `{str(result.get('digest', ''))[:16]}`, artifact `{str(result['artifact']['manifest_sha256'])[:16]}`"
        for name, result in results.items()
    ]
    lines += ["", "## Licence", "", LICENCE]
    return "\n".join(lines) + "\n"


def _stage_line(config: RunConfig, name: str, result: Mapping[str, Any]) -> str:
    hours = float(result.get("seconds") or 0.0) / 3600
    cells = [
        name,
        result["kind"],
        result.get("steps", ""),
        result.get("trained_tokens", ""),
        _number(result.get("eval_loss_before")),
        _number(result.get("eval_loss_after")),
        _source_name(config, name),
        f"{hours:.2f}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"

"""Which rows a stage can train on, and what to type otherwise. Must not import torch."""

from __future__ import annotations

from orchestrator.config.data import DataFormat
from orchestrator.config.run import Stage
from orchestrator.config.stage import RowKind
from orchestrator.data.formats.columns import KINDS, mapping_override, suggested
from orchestrator.data.formats.examples import Row
from orchestrator.data.formats.parse import EXPECTED_FIELDS

FORMAT_OF: dict[RowKind, DataFormat] = {
    "text": "alpaca",
    "pair": "preference",
    "feedback": "feedback",
    "class": "classification",
    "prompt": "prompts",
}
"""The format to suggest if a stage needs rows of a kind."""


def format_problem(stage: Stage, data_format: DataFormat | None, row: Row | None, *, field: str) -> str | None:
    """Why the rows of a source are useless or wrong for a stage, with what to type; None if they fit."""
    wanted = stage.rows_wanted
    if wanted is None or data_format is None or KINDS[data_format] == wanted:
        return None
    why, advice = _untrained(data_format, row, field=field) if wanted == "text" else ("", "")
    if not advice:
        name = FORMAT_OF[wanted]
        mapping = None if row is None else suggested(list(map(str, row)), wanted)
        advice = (
            f"type {mapping_override(field, mapping)}"
            if mapping
            else f"it needs format {name}: {EXPECTED_FIELDS[name]}"
        )
    return f"{field}: rows of format {data_format} {why or f'cannot train stage={stage.kind}'}; {advice}"


def _untrained(data_format: DataFormat, row: Row | None, *, field: str) -> tuple[str, str]:
    """Why such rows do not suit supervised fine-tuning, and what to type."""
    row = row or {}
    names = list(map(str, row))
    match data_format:
        case "prompts":
            mapping = suggested(names, "text") or {"instruction": "prompt", "output": "COLUMN"}
            return "hold no answer to train on", f"name the answer's column with {mapping_override(field, mapping)}"
        case "preference":
            why = "are pairs, and the rejected answers would be trained on too"
            return (
                why,
                f"for the chosen answers alone type {mapping_override(field, _chosen(row))}; dpo and reward take pairs",
            )
        case "feedback":
            return (
                "rate answers as good or bad, and the bad ones would be trained on too",
                f"keep the good ones in a file of their own and type {field}.format=prompt_completion; stage=dpo with loss=kto takes both",
            )
        case "classification":
            return (
                "are texts with a label, which sft does not train on",
                "for a classifier use +experiment=llama_classify; to train on the label as an answer type "
                + mapping_override(field, {"instruction": "text", "output": "label"}),
            )
        case _:
            return "", ""


def _chosen(row: Row) -> dict[str, str]:
    """Conversations include their prompt; of texts, the prompt has its own column, or there is none."""
    if isinstance(row.get("chosen"), list):
        return {"messages": "chosen"}
    if "instruction" in row:
        return {"output": "chosen"}
    return {"instruction": "prompt", "output": "chosen"} if "prompt" in row else {"text": "chosen"}

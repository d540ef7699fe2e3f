"""Completions in the form that rewards and metrics receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.data.encoding.tokenizer import load_tokenizer
from orchestrator.generation.generator import Completion, Request
from orchestrator.rewards.builtin import Sample
from orchestrator.run_state.stage_context import StageContext


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A completion in the form that rewards receive."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sample: Sample


def as_scored(context: StageContext, request: Request, completion: Completion, row: Mapping[str, Any]) -> Scored:
    """A completion with ids and texts."""
    tokenizer = load_tokenizer(context.base_folder)
    sample = Sample(
        prompt=tokenizer.decode(list(request.prompt), skip_special_tokens=True),
        completion=tokenizer.decode(list(completion.ids), skip_special_tokens=True),
        tokens=len(completion.ids),
        is_finished=completion.is_finished,
        row=row,
    )
    return Scored(prompt_ids=request.prompt, completion_ids=completion.ids, sample=sample)

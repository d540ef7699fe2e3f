"""The prompt of a prepared row, and what rewards and metrics need of the row."""

from __future__ import annotations

from typing import Any

from orchestrator.data.encoding.tokenizer import load_tokenizer
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.run_state.stage_context import StageContext


def prompt_of(context: StageContext, rows: PreparedRows, index: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(prompt ids, row for rewards), from a prompt set or from a row with an answer, which then is the reference."""
    if rows.meta.kind == "prompt":
        prompt = rows.prompt(index)
        return prompt.ids, prompt.extra
    ids, trained = rows.document(rows.document_of(index))
    first = int(trained.argmax())
    tokenizer = load_tokenizer(context.base_folder)
    answer = tokenizer.decode(ids[first:].tolist(), skip_special_tokens=True).strip()
    return tuple(ids[:first].tolist()), {"answer": answer}

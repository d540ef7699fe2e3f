"""Examples -> token ids and a mask of trained tokens; must not import torch or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from orchestrator.config.data import DataConfig
from orchestrator.data.encoding.answer_spans import NotRendered, Rendered, only_last, render_chat
from orchestrator.data.encoding.chat_template import DEFAULT_TEMPLATE, ChatTemplate, TemplateRefused, check_date
from orchestrator.data.encoding.labelled_text import encode_labelled
from orchestrator.data.encoding.tokenizer import TokenizerFacts, core_tokenizer, is_splittable
from orchestrator.data.encoding.turn_markers import Turns, learn_turns
from orchestrator.data.formats.examples import Chat, Example, Labelled, Plain, Prompt
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint32]
Trained = npt.NDArray[np.bool_]


UNCUT = 2**40
"""No truncation if packing itself splits documents over rows."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Everything that determines how an example becomes tokens; small and plain enough to send to processes."""

    facts: TokenizerFacts
    template: ChatTemplate
    turns: Turns
    loss_on: Literal["answers", "last_answer", "all"]
    max_length: int
    """Tokens after which a document is truncated."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document. `ids` and `trained` are truncated; `num_cut` tokens were lost, `num_cut_trained` trained ones."""

    ids: Ids
    trained: Trained
    num_cut: int
    num_cut_trained: int
    num_open_ends: int
    """Answers that no special token closes."""
    num_straddling: int
    """Trained tokens that are part prompt, part answer."""


def make_encoder(facts: TokenizerFacts, config: DataConfig) -> Encoder:
    """The encoder that a data configuration describes. Raises DataError if the template file cannot be used."""
    check_date(config.template_date)
    template = ChatTemplate(template_source(facts, config), facts.special_tokens, config.template_date)
    special = [token.content for token in core_tokenizer(facts.core).get_added_tokens_decoder().values()]
    max_length = UNCUT if config.packing == "split" else config.max_length
    return Encoder(facts, template, learn_turns(template, special), config.loss_on, max_length)


def template_source(facts: TokenizerFacts, config: DataConfig) -> str:
    """The chat template's text: the configured file, else the tokenizer's, else the documented default."""
    if config.chat_template is None:
        return facts.chat_template if facts.chat_template is not None else DEFAULT_TEMPLATE
    try:
        return Path(config.chat_template).expanduser().read_text()
    except (OSError, UnicodeError) as error:
        raise DataError(f"chat_template={config.chat_template} cannot be read: {error}") from error


def prompt_text(prompt: Prompt, encoder: Encoder) -> str:
    """The text a model is asked to continue: the conversation with the generation prompt, or the plain text."""
    if prompt.messages is None:
        return prompt.text
    try:
        return encoder.template.render(prompt.messages, prompt.tools, add_generation_prompt=True)
    except TemplateRefused as refusal:
        raise NotRendered("prompt", f"is refused by the chat template: {refusal}", code="template_refused") from refusal


def encode_prompt(prompt: Prompt, encoder: Encoder) -> list[int]:
    """Token ids to generate from: the same as in training, and never with two BOS tokens."""
    tokenizer = core_tokenizer(encoder.facts.core)
    text = prompt_text(prompt, encoder)
    if prompt.messages is not None:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return _with_beginning(tokenizer.encode(text, add_special_tokens=False).ids, encoder.facts)


def _with_beginning(ids: list[int], facts: TokenizerFacts) -> list[int]:
    """Plain text starts with the tokenizer's own prefix (BOS or nothing), once."""
    first = _beginning(facts.core)
    return ids if not first or ids[: len(first)] == first else [*first, *ids]


@lru_cache(maxsize=4)
def _beginning(core: str) -> list[int]:
    """The ids that the tokenizer itself puts before a text."""
    tokenizer = core_tokenizer(core)
    with_special = tokenizer.encode("x", add_special_tokens=True).ids
    without = tokenizer.encode("x", add_special_tokens=False).ids
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return with_special[:start]
    return []


def encode_examples(examples: Sequence[Example], encoder: Encoder) -> list[tuple[Encoded, ...] | NotRendered]:
    """The documents of every example in order, or the reason why one cannot be encoded."""
    if examples and isinstance(examples[0].documents[0], Labelled):
        return [_labelled(example, encoder) for example in examples]
    plans: list[list[_Plan] | NotRendered] = []
    for example in examples:
        try:
            plans.append([_plan(document, encoder) for document in example.documents])
        except NotRendered as problem:
            plans.append(problem)
    flat = [plan for item in plans if not isinstance(item, NotRendered) for plan in item]
    encoded = iter(_encode_plans(flat, encoder))
    return [item if isinstance(item, NotRendered) else tuple(next(encoded) for _ in item) for item in plans]


def _labelled(example: Example, encoder: Encoder) -> tuple[Encoded, ...] | NotRendered:
    """Encode a labelled text: a class is trained, no token is."""
    (document,) = example.documents
    assert isinstance(document, Labelled)
    try:
        ids, num_cut = encode_labelled(document, encoder.facts, encoder.max_length)
    except NotRendered as problem:
        return problem
    nothing = np.zeros(len(ids), dtype=np.bool_)
    whole = Encoded(np.array(ids, dtype=np.uint32), nothing, num_cut, 0, num_open_ends=0, num_straddling=0)
    return (whole,)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A text, its trained spans, and what is put around its tokens."""

    text: str
    spans: tuple[tuple[int, int], ...]
    begins: bool
    """Starts with the tokenizer's own prefix (plain text; a chat template writes its own)."""
    ends: bool
    """Ends with the trained end-of-text token."""
    num_open_ends: int


def _plan(document: Chat | Plain | Prompt | Labelled, encoder: Encoder) -> _Plan:
    assert not isinstance(document, Labelled), "rows with a label have no learnt tokens"
    if isinstance(document, Prompt):
        return _Plan(prompt_text(document, encoder), (), document.messages is None, ends=False, num_open_ends=0)
    everything = encoder.loss_on == "all"
    if isinstance(document, Plain):
        text = document.prompt + document.completion
        start = 0 if everything else len(document.prompt)
        return _Plan(
            text, ((start, len(text)),), begins=True, ends=True, num_open_ends=int(encoder.facts.eos_id is None)
        )
    rendered: Rendered = render_chat(
        only_last(document) if encoder.loss_on == "last_answer" else document, encoder.template, encoder.turns
    )
    spans = ((0, len(rendered.text)),) if everything else rendered.spans
    return _Plan(rendered.text, spans, begins=False, ends=False, num_open_ends=rendered.num_open_ends)


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: Ids
    trained: Trained
    num_straddling: int


def _encode_plans(plans: Sequence[_Plan], encoder: Encoder) -> list[Encoded]:
    encode = _encode_pieces if is_splittable(encoder.facts.core) else _encode_with_offsets
    return [_finish(tokens, plan, encoder) for tokens, plan in zip(encode(plans, encoder), plans, strict=True)]


def _encode_pieces(plans: Sequence[_Plan], encoder: Encoder) -> list[_Tokens]:
    """Split every text at its span boundaries, so that a prompt has the tokens it has at generation."""
    pieces: list[str] = []
    shapes: list[list[bool]] = []
    for plan in plans:
        position, learnt = 0, []
        for start, end in plan.spans:
            if start > position:
                pieces.append(plan.text[position:start])
                learnt.append(False)
            if end > start:
                pieces.append(plan.text[start:end])
                learnt.append(True)
            position = end
        if position < len(plan.text):
            pieces.append(plan.text[position:])
            learnt.append(False)
        shapes.append(learnt)
    encodings = iter(core_tokenizer(encoder.facts.core).encode_batch_fast(pieces, add_special_tokens=False))
    found: list[_Tokens] = []
    for learnt in shapes:
        ids: list[int] = []
        counts: list[int] = []
        for _ in learnt:
            piece = next(encodings).ids
            ids += piece
            counts.append(len(piece))
        found.append(_Tokens(np.array(ids, dtype=np.uint32), np.repeat(np.array(learnt, dtype=np.bool_), counts), 0))
    return found


def _encode_with_offsets(plans: Sequence[_Plan], encoder: Encoder) -> list[_Tokens]:
    """Encode every text whole; a token is trained if it overlaps a trained span (tokenizers that mark word starts).

    If a token crosses a boundary, the text is encoded in pieces instead, so that the prompt has the tokens it has at
    generation. A special token that absorbs the whitespace after it is kept as it is, and is not trained.
    """
    tokenizer = core_tokenizer(encoder.facts.core)
    added = {identity: token.content for identity, token in tokenizer.get_added_tokens_decoder().items()}
    special = np.array(sorted(added), dtype=np.int64)
    encodings = tokenizer.encode_batch([plan.text for plan in plans], add_special_tokens=False)
    found: list[_Tokens] = []
    for plan, encoding in zip(plans, encodings, strict=True):
        ids = np.array(encoding.ids, dtype=np.uint32)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        movable = ~np.isin(ids, special)
        trained = np.zeros(len(ids), dtype=np.bool_)
        over: list[int] = []
        for start, end in plan.spans:
            inside = (starts < end) & (ends > start)
            over += starts[inside & movable & ((starts < start) | (ends > end))].tolist()
            trained |= inside & (movable | (starts >= start))
        pieces = _encode_apart(plan, tokenizer, tuple(added.values())) if over else None
        blanks = sum(plan.text[offset : offset + 1].isspace() for offset in over)
        found.append(pieces if pieces is not None else _Tokens(ids, trained, len(over) - blanks))
    return found


def _encode_apart(plan: _Plan, tokenizer: Tokenizer, added: tuple[str, ...]) -> _Tokens | None:
    """The spans of a text encoded separately, each as in the middle of a text; None if that is impossible.

    A NUL before a piece keeps the tokenizer from marking a word start; no token merges it with what follows.
    """
    ids: list[int] = []
    trained: list[bool] = []
    position = 0
    for start, end in (*plan.spans, (len(plan.text), len(plan.text))):
        for piece, learnt in ((plan.text[position:start], False), (plan.text[start:end], True)):
            before = plan.text[: position if not learnt else start]
            if not piece:
                continue
            anchor = "" if not before or before.endswith(added) else "\0"
            encoding = tokenizer.encode(anchor + piece, add_special_tokens=False)
            skip = next((i for i, (at, _) in enumerate(encoding.offsets) if at >= len(anchor)), 0)
            if any(until > len(anchor) for _, until in encoding.offsets[:skip]):
                return None
            ids += encoding.ids[skip:]
            trained += [learnt] * (len(encoding.ids) - skip)
        position = end
    return _Tokens(np.array(ids, dtype=np.uint32), np.array(trained, dtype=np.bool_), 0)


def _finish(tokens: _Tokens, plan: _Plan, encoder: Encoder) -> Encoded:
    """Add prefix and end, exclude the first token as a target, cut to the maximum length."""
    facts, ids, trained = encoder.facts, tokens.ids, tokens.trained
    if plan.begins:
        whole = np.array(_with_beginning(ids[:8].tolist(), facts), dtype=np.uint32)
        added = len(whole) - min(8, len(ids))
        ids = np.concatenate([whole[:added], ids])
        trained = np.concatenate([np.zeros(added, dtype=np.bool_), trained])
    if plan.ends and facts.eos_id is not None and (not len(ids) or ids[-1] != facts.eos_id):
        ids = np.append(ids, np.uint32(facts.eos_id))
        trained = np.append(trained, True)
    if len(trained):
        trained[0] = False
    cut = max(0, len(ids) - encoder.max_length)
    cut_trained = int(trained[encoder.max_length :].sum()) if cut else 0
    return Encoded(
        ids=ids[: encoder.max_length],
        trained=trained[: encoder.max_length],
        num_cut=cut,
        num_cut_trained=cut_trained,
        num_open_ends=plan.num_open_ends,
        num_straddling=tokens.num_straddling,
    )

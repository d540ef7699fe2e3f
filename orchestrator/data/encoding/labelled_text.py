"""Labelled texts -> token ids, as the tokenizer itself makes them; must not import torch or transformers.

With its own prefix, separator and end, and nothing else, so that anyone who opens a model folder with its tokenizer
gets the answers that were trained.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING

from orchestrator.data.encoding.answer_spans import NotRendered
from orchestrator.data.encoding.tokenizer import TokenizerFacts, core_tokenizer
from orchestrator.data.formats.examples import Labelled

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAIR_JOINT = "\n\n"
"""Joins two texts if the tokenizer puts nothing of its own between them."""


def encode_labelled(document: Labelled, facts: TokenizerFacts, max_length: int) -> tuple[list[int], int]:
    """(token ids, tokens lost to `max_length`). The longer text of two is cut first; special tokens are kept.

    Raises NotRendered if a text contains the tokenizer's separator: the two texts could not be told apart.
    """
    texts = texts_of(document, facts.core)
    encoding = core_tokenizer(facts.core).encode(*texts, add_special_tokens=True)  # pyright: ignore[reportArgumentType]  # a text or a pair
    separator = separator_of(facts)
    own = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    if separator is not None and any(token == separator and not is_own for token, is_own in own):
        mark = dict(facts.special_tokens)["sep_token"]
        raise NotRendered("text", f"holds {mark}, the tokenizer's own separator", code="separator_in_text")
    if len(encoding.ids) <= max_length:
        return encoding.ids, 0
    cut = _cutting_tokenizer(facts.core, max_length).encode(*texts, add_special_tokens=True).ids  # pyright: ignore[reportArgumentType]  # likewise
    return cut, len(encoding.ids) - len(cut)


def texts_of(document: Labelled, core: str) -> tuple[str, ...]:
    """One text, or two if the tokenizer supports pairs; otherwise both in one, separated by an empty line."""
    if document.pair is None:
        return (document.text,)
    if knows_pairs(core):
        return document.text, document.pair
    return (document.text + PAIR_JOINT + document.pair,)


def separator_of(facts: TokenizerFacts) -> int | None:
    """The id of the separator; None if the tokenizer has none."""
    text = dict(facts.special_tokens).get("sep_token")
    return None if text is None else core_tokenizer(facts.core).token_to_id(text)


@lru_cache(maxsize=4)
def knows_pairs(core: str) -> bool:
    """Whether the tokenizer puts a special token between two texts."""
    tokenizer = core_tokenizer(core)
    marked = tokenizer.encode("x", "y", add_special_tokens=True).special_tokens_mask
    plain = [index for index, is_own in enumerate(marked) if not is_own]
    return any(later - earlier > 1 for earlier, later in itertools.pairwise(plain))


@lru_cache(maxsize=4)
def _cutting_tokenizer(core: str, max_length: int) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(core)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer

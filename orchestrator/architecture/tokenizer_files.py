"""The files of a tokenizer in a model folder: which are required, copied and covered by its digest."""

from __future__ import annotations

VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
)  # fmt: skip
"""One of these is required."""
TOKENIZER_FILES = (
    # order of the digest: append new names, so that prepared rows of other tokenizers keep theirs
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""All that decide token ids, besides tokenizer_config.json."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

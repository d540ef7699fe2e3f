"""A tokenizer as its Rust core plus the facts the data path needs; imports transformers only if the folder needs it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that pass tokenizer.json to the Rust library unchanged; transformers builds tokenizers of other classes."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """Everything that encoding needs, small enough to be sent to worker processes."""

    core: str
    """The Rust tokenizer as JSON."""
    chat_template: str | None
    special_tokens: tuple[tuple[str, str], ...]
    """Names for the template: (bos_token, <s>), ..."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int

    @property
    def eos_token(self) -> str | None:
        return dict(self.special_tokens).get("eos_token")


def load_facts(folder: Path) -> TokenizerFacts:
    """Read a tokenizer folder. Raises ModelError if there is none."""
    config = _read_json(folder / "tokenizer_config.json")
    is_plain = config.get("tokenizer_class", "PreTrainedTokenizerFast") in PLAIN_CLASSES
    adds = any(config.get(key) is not None for key in ("add_bos_token", "add_eos_token"))
    if (folder / "tokenizer.json").is_file() and is_plain and not adds:
        return _facts(
            (folder / "tokenizer.json").read_text(), _special_tokens(folder, config), _template(folder, config)
        )
    return _through_transformers(folder)


def _through_transformers(folder: Path) -> TokenizerFacts:
    from transformers import AutoTokenizer

    try:
        tokenizer = cast("Any", AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        core = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder} holds no usable tokenizer (tokenizer.json expected): {error}") from error
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return _facts(core, special, template)


def _facts(core: str, special: dict[str, str], template: str | None) -> TokenizerFacts:
    tokenizer = core_tokenizer(core)
    ids = {name: tokenizer.token_to_id(text) for name, text in special.items()}
    eos, pad = ids.get("eos_token"), ids.get("pad_token")
    return TokenizerFacts(
        core=core,
        chat_template=template,
        special_tokens=tuple(sorted(special.items())),
        bos_id=ids.get("bos_token"),
        eos_id=eos,
        pad_id=pad if pad is not None else eos if eos is not None else 0,
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder."""
    return core_tokenizer(load_facts(folder).core)


@lru_cache(maxsize=4)
def core_tokenizer(core: str) -> Tokenizer:
    """The Rust tokenizer of a JSON text, without the truncation and padding settings that some files contain."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(core)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=4)
def is_splittable(core: str) -> bool:
    """Whether a text may be cut between any words and encoded in pieces: nothing is added at the start of a piece."""
    tokenizer = core_tokenizer(core)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return (
        ids("\nx") == ids("\n") + ids("x")
        and ids("x y") == ids("x") + ids(" y")
        and ids("x\ny") == ids("x\n") + ids("y")
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    both = {**_read_json(folder / "special_tokens_map.json"), **config}
    texts = {name: both[name] for name in names if both.get(name) is not None}
    return {name: str(value["content"]) if isinstance(value, dict) else str(value) for name, value in texts.items()}


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").is_file():
        return cast("str | None", _read_json(folder / "chat_template.json").get("chat_template"))
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in cast("list[dict[str, str]]", template)}
        return named.get("default")
    return cast("str | None", template)

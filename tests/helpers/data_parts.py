"""Realistic parts for data path tests: small tokenizers trained here, templates written from the published formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.data import DataConfig

ROOT = Path(__file__).resolve().parents[2]
CORPUS = (
    "The quick brown fox jumps over the lazy dog. How are you? I am fine, thank you! What is 12 + 30? It is 42.\n"
    "user system assistant tool human Write a short answer, please. def f(x): return x + 1\n\n  Hello world  \t<b>\n"
    'Ein Satz über Züge. Une phrase déjà vue. 東京は日本の首都です。 {"name": "f", "arguments": {"x": 1}} [INST] [/INST] <<SYS>>\n'
)


@dataclass(frozen=True)
class Family:
    """A chat format: special tokens, template, and what of an answer is trained, per its publisher's documents."""

    name: str
    template: str | None
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    learnt: Callable[[str, bool], str]
    """(content, is the last message) -> the trained text of an answer."""
    has_system: bool = True
    metaspace: bool = False
    keeps_content: bool = True
    """Whether the template keeps whitespace at the ends of the content."""
    pattern: str | None = None
    """How the publisher's tokenizer splits words; None as GPT-2 does."""


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED_SHORT = CHATML_MARKED.replace(
    "message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = QWEN2.replace(
    "You are a helpful assistant.", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # the system message is part of the last user turn
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.index0 >= (loop_messages | length) - 2 and system_message is defined "
    "and message == (loop_messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def _qwen3_learnt(content: str, last: bool) -> str:
    if last:
        return "<think>\n\n</think>\n\n" + content.lstrip("\n") + "<|im_end|>"
    return content + "<|im_end|>"


LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", CHATML, CHATML_SPECIALS, None, "<|im_end|>", lambda c, _: c + "<|im_end|>"),
        Family("chatml_marked", CHATML_MARKED, CHATML_SPECIALS, None, "<|im_end|>", lambda c, _: c + "<|im_end|>"),
        Family(
            "chatml_marked_short",
            CHATML_MARKED_SHORT,
            CHATML_SPECIALS,
            None,
            "<|im_end|>",
            lambda c, _: c + "<|im_end|>",
        ),
        Family("qwen2", QWEN2, CHATML_SPECIALS, None, "<|im_end|>", lambda c, _: c + "<|im_end|>"),
        Family("smollm2", SMOLLM2, CHATML_SPECIALS, "<|im_start|>", "<|im_end|>", lambda c, _: c + "<|im_end|>"),
        Family(
            "qwen3",
            QWEN3,
            (*CHATML_SPECIALS, "<think>", "</think>", "<tool_call>", "</tool_call>"),
            None,
            "<|im_end|>",
            _qwen3_learnt,
            keeps_content=False,
        ),
        Family(
            "llama3",
            LLAMA3,
            LLAMA3_SPECIALS,
            "<|begin_of_text|>",
            "<|eot_id|>",
            lambda c, _: c.strip() + "<|eot_id|>",
            pattern=LLAMA3_PATTERN,
        ),
        Family(
            "llama31",
            LLAMA31,
            LLAMA3_SPECIALS,
            "<|begin_of_text|>",
            "<|eot_id|>",
            lambda c, _: c.strip() + "<|eot_id|>",
            pattern=LLAMA3_PATTERN,
        ),
        Family(
            "llama2", LLAMA2, ("<unk>", "<s>", "</s>"), "<s>", "</s>", lambda c, _: f" {c.strip()} </s>", metaspace=True
        ),
        Family(
            "mistral", MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", lambda c, _: f" {c.strip()}</s>"
        ),
        Family(
            "gemma",
            GEMMA,
            ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
            "<bos>",
            "<eos>",
            lambda c, _: c.strip() + "<end_of_turn>",
            has_system=False,
            metaspace=True,
        ),
        Family(
            "phi3",
            PHI3,
            ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            "<s>",
            "<|endoftext|>",
            lambda c, _: c + "<|end|>",
            metaspace=True,
        ),
        Family("no_template", None, ("<s>", "</s>"), "<s>", "</s>", lambda c, _: f" {c}</s>"),
    )
}


@lru_cache
def _byte_level(specials: tuple[str, ...], pattern: str | None) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    return tokenizer.to_str()


@lru_cache
def _metaspace(specials: tuple[str, ...]) -> str:
    """Like SentencePiece's BPE with byte fallback: words and the text start with a mark (Llama-2, Gemma, Phi-3)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    names = (*dict.fromkeys(("<unk>", *specials)), *(f"<0x{value:02X}>" for value in range(256)))
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(names), show_progress=False)
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    state["normalizer"] = json.loads(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]).__getstate__()
    )
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return tokenizer.to_str()


def tokenizer_json(family: Family) -> str:
    """The Rust tokenizer of a family, trained on a few sentences."""
    return _metaspace(family.specials) if family.metaspace else _byte_level(family.specials, family.pattern)


def write_tokenizer(folder: Path, family: Family, *, adds_bos: bool = False) -> Path:
    """A tokenizer folder as written by `save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    core = json.loads(tokenizer_json(family))
    if adds_bos:
        assert family.bos is not None
        identity = next(token["id"] for token in core["added_tokens"] if token["content"] == family.bos)
        core["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": family.bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {family.bos: {"id": family.bos, "ids": [identity], "tokens": [family.bos]}},
        }
    (folder / "tokenizer.json").write_text(json.dumps(core))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos,
        "model_max_length": 1_000_000,
    }
    if family.bos:
        config["bos_token"] = family.bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if family.template is not None:
        (folder / "chat_template.jinja").write_text(family.template)
    return folder


def data_config(**changes: Any) -> DataConfig:
    """conf/data/base.yaml with changes; `train__path=...` sets a key of a section."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "conf/data/base.yaml").read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return DataConfig.model_validate(values)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path

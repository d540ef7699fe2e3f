"""Builds the inputs of training tests: a tiny Llama with its own tokenizer, and rows of text. No network, no hub."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "apple",
    "stone",
    "river",
    "cloud",
    "seven",
    "three",
    "north",
    "south",
    "winter",
    "summer",
    "paper",
    "silver",
    "garden",
]


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 bytes and three special tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*marks, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def write_llama(folder: Path, *, layers: int = 2, hidden: int = 32, seed: int = 0, tied: bool = False) -> Path:
    """A random Llama with two small layers as a complete model folder, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Alpaca rows of unequal lengths that a model can learn: the answer repeats words of the question."""
    lines: list[str] = []
    for number in range(start, start + count):
        words = [WORDS[(number * 7 + step * 3) % len(WORDS)] for step in range(1 + number % 9)]
        row = {"instruction": f"Say {' '.join(words)} ({number})", "input": "", "output": " ".join(words)}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

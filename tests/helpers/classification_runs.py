"""Fixtures for tests of classifiers: tiny encoders with a character tokenizer, labelled rows, run overrides."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_model import WORDS

ENCODERS = ("bert", "roberta", "distilbert")


def write_encoder(folder: Path, family: str, *, seed: int = 0) -> Path:
    """A random encoder with two small layers, without dropout, saved with the head of a masked language model."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    size = write_letters(folder)
    facts = {"vocab_size": size, "max_position_embeddings": 132, "initializer_range": 0.1, "pad_token_id": 0}
    if family == "distilbert":
        facts |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        facts |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    else:
        facts |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        facts |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "roberta":
        facts["type_vocab_size"] = 1
    torch.manual_seed(seed)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **facts)).save_pretrained(folder)
    return folder


def write_decoder(folder: Path, family: str, *, seed: int = 0) -> Path:
    """A random decoder with two small layers and the tokenizer of the tiny Llama."""
    import tiny_model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_model.write_tokenizer(folder)
    facts = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    facts |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1}
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **facts)).save_pretrained(folder)
    return folder


def write_letters(folder: Path) -> int:
    """Write a character tokenizer with BERT's special tokens; return the vocabulary size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate([*marks, *letters, *(f"##{one}" for one in letters)])}
    core = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    special = {f"{name}_token": text for name, text in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return len(vocabulary)


def write_labelled(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colours(first: int, count: int) -> list[dict[str, object]]:
    """Texts whose class is the one colour in them; every third row has no weak label, every fifth a wrong one."""
    names = ("red", "green", "blue")
    rows: list[dict[str, object]] = []
    for number in range(first, first + count):
        right = number % 3
        others = [WORDS[(number * 7 + step * 3) % len(WORDS)] for step in range(2 + number % 4)]
        text = " ".join(
            word for word in [*others[:1], names[right], *others[1:]] if word == names[right] or word not in names
        )
        weak = None if number % 3 == number % 7 % 3 else names[(right + (number % 5 == 0)) % 3]
        rows.append({"text": f"{text} {number}", "label": names[right], "weak": weak})
    return rows


def words_of(root: Path, name: str, *more: str, base: str = "model", experiment: str = "llama_classify") -> list[str]:
    """The overrides of a six-step fp32 classifier with three classes."""
    stages = ("classify",) if experiment == "llama_classify" else ("classify", "self_training")
    words = [f"+experiment={experiment}", f"name={name}", f"output_dir={root / 'runs'}", f"model.base={root / base}"]
    words += ["model.dtype=float32", "tracking=none", "launcher=local", "cluster.device=cpu"]
    for stage in stages:
        words += [
            f"stages.{stage}.{word}"
            for word in (
                f"data.train.path={root / 'colours.jsonl'}",
                f"data.eval.path={root / 'held_out_colours.jsonl'}",
                "data.max_length=96",
                "max_steps=6",
                "epochs=null",
                "batch.global_size=8",
                "batch.micro_size=2",
                "optimizer.lr=5e-3",
            )
        ]
    return [*words, *more]


def write_sets(root: Path) -> None:
    write_labelled(root / "colours.jsonl", colours(0, 48))
    write_labelled(root / "held_out_colours.jsonl", colours(1000, 15))

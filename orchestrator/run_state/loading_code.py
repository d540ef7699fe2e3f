"""Generates Python code that loads an artifact with only transformers and PEFT. Must not import torch."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.run_state.artifact_kind import ArtifactKind

REFT_SETTINGS = "reft_config.json"
_QUESTION = '[{"role": "user", "content": "What is the capital of France?"}]'


def loading_lines(artifact: str, *, kind: ArtifactKind, base: str, folder: Path) -> list[str]:
    """A script that loads an artifact and prompts it; `artifact` and `base` are the paths to appear in it.

    `folder` is the artifact's current path: whether it has a chat template decides how the script builds a prompt.
    """
    if (folder / REFT_SETTINGS).is_file():
        return ["# PEFT has no LoReFT: `orchestrator generate RUN` opens this artifact"]
    chats = has_chat_template(folder)
    if kind.is_classifier:
        return _classifier(artifact, base, is_adapter=kind.is_adapter)
    build = _reward if kind.is_reward else _policy
    return build(artifact, base, is_adapter=kind.is_adapter, chats=chats)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a folder can render a conversation."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    file = folder / "tokenizer_config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _policy(artifact: str, base: str, *, is_adapter: bool, chats: bool) -> list[str]:
    return [
        *(["from peft import PeftModel"] if is_adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(artifact)})",
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(base if is_adapter else artifact)})",
        *([f"model = PeftModel.from_pretrained(model, {_quoted(artifact)})"] if is_adapter else []),
        *_inputs(f"messages = {_QUESTION}" if chats else "", chats=chats, generates=True),
        "answer = model.eval().generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _inputs(messages: str, *, chats: bool, generates: bool) -> list[str]:
    if not chats:
        return ['inputs = tokenizer("The capital of France is", return_tensors="pt")']
    prompt = "add_generation_prompt=True, " if generates else ""
    return [
        messages,
        f'inputs = tokenizer.apply_chat_template(messages, {prompt}return_tensors="pt", return_dict=True)',
    ]


def _reward(artifact: str, base: str, *, is_adapter: bool, chats: bool) -> list[str]:
    answered = f'messages = {_QUESTION[:-1]}, {{"role": "assistant", "content": "Paris."}}]'
    return [
        *(["from peft import PeftModel"] if is_adapter else []),
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(artifact)})",
        f"model = AutoModelForSequenceClassification.from_pretrained({_quoted(base if is_adapter else artifact)}, num_labels=1)",
        *([f"model = PeftModel.from_pretrained(model, {_quoted(artifact)})"] if is_adapter else []),
        *_inputs(answered, chats=chats, generates=False),
        "print(model.eval()(**inputs).logits[0, 0].item())",
    ]


def _classifier(artifact: str, base: str, *, is_adapter: bool) -> list[str]:
    names = ["AutoModelForSequenceClassification", "AutoTokenizer"]
    load = [f"model = AutoModelForSequenceClassification.from_pretrained({_quoted(artifact)})"]
    if is_adapter:  # the base's own config does not contain the classes
        names = ["AutoConfig", *names]
        load = [
            f"config = AutoConfig.from_pretrained({_quoted(artifact)})",
            f"model = AutoModelForSequenceClassification.from_pretrained({_quoted(base)}, config=config)",
            f"model = PeftModel.from_pretrained(model, {_quoted(artifact)})",
        ]
    return [
        *(["from peft import PeftModel"] if is_adapter else []),
        f"from transformers import {', '.join(names)}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(artifact)})",
        *load,
        'logits = model.eval()(**tokenizer("a text to judge", return_tensors="pt")).logits[0]',
        "print({model.config.id2label[number]: value for number, value in enumerate(logits.tolist())})",
    ]


def _quoted(path: str) -> str:
    """A Python literal in double quotes, as formatters write it."""
    return json.dumps(path, ensure_ascii=False)

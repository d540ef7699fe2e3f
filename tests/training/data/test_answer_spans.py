"""What the loss sees, over random conversations and the templates of the known model families."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from data_parts import CHATML, FAMILIES, QWEN3, Family, data_config, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.encoding.answer_spans import NotRendered
from orchestrator.data.encoding.encoder import Encoded, Encoder, encode_examples, encode_prompt, make_encoder
from orchestrator.data.encoding.tokenizer import core_tokenizer, is_splittable, load_facts
from orchestrator.data.formats.examples import Chat, Prompt
from orchestrator.data.formats.parse import parse_row


@lru_cache
def encoder_of(name: str, loss_on: str = "answers", adds_bos: bool = False, max_length: int = 100_000) -> Encoder:
    folder = write_tokenizer(Path(mkdtemp()), FAMILIES[name], adds_bos=adds_bos)
    return make_encoder(load_facts(folder), data_config(loss_on=loss_on, max_length=max_length))


def encode(row: dict[str, Any], encoder: Encoder, data_format: str = "messages") -> Encoded:
    (found,) = encode_examples([parse_row(row, data_format, {})], encoder)  # type: ignore[arg-type]
    if isinstance(found, NotRendered):
        raise found
    return found[0]


def trained_runs(encoded: Encoded, encoder: Encoder) -> list[str]:
    """The text of every unbroken run of learnt tokens."""
    runs: list[list[int]] = []
    before = False
    for token, learnt in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if learnt and not before:
            runs.append([])
        if learnt:
            runs[-1].append(token)
        before = learnt
    return [core_tokenizer(encoder.facts.core).decode(run, skip_special_tokens=False) for run in runs]


words = st.text(
    st.one_of(
        st.sampled_from(" \n\tabcxyz.,!?{}[]#'\"<|>/0123456789éüß東京😀"),
        st.characters(codec="utf-8", exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=40,
).filter(
    lambda text: (
        bool(text.strip()) and not any(mark in text for mark in ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\x00", "▁"))
    )
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return messages


def adapted(messages: list[dict[str, str]], family: Family) -> list[dict[str, str]]:
    """The conversation as the family allows it, free of its own special tokens."""
    kept = [dict(message) for message in messages if family.has_system or message["role"] != "system"]
    for message in kept:
        for special in (*family.specials, "<think>", "</think>"):
            message["content"] = message["content"].replace(special, "x")
        if not message["content"].strip():
            message["content"] = "x"
    return kept


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_trained_spans_are_the_answers_and_their_ends(name: str, messages: list[dict[str, str]]) -> None:
    family, encoder = FAMILIES[name], encoder_of(name)
    messages = adapted(messages, family)
    found = trained_runs(encode({"messages": messages}, encoder), encoder)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    expected = [family.learnt(messages[i]["content"], i == len(messages) - 1) for i in answers]
    if family.metaspace:  # its decoder drops the first blank
        expected = [text.removeprefix(" ") for text in expected]
    assert found == expected


def test_every_family_was_tried() -> None:
    assert len(FAMILIES) == 13
    assert {is_splittable(encoder_of(name).facts.core) for name in FAMILIES} == {True, False}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The ids equal `apply_chat_template` of the same folder, where no learnt border cuts a token."""
    from transformers import AutoTokenizer

    family = FAMILIES[name]
    if family.template is None:
        pytest.skip("transformers has no default template")
    reference = AutoTokenizer.from_pretrained(str(write_tokenizer(tmp_path, family)))
    messages = [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I am fine, thank you!"},
        {"role": "user", "content": "What is 12 + 30? Züge 東京"},
        {"role": "assistant", "content": "It is 42."},
    ]
    if family.has_system:
        messages.insert(0, {"role": "system", "content": "Write a short answer, please."})
    ours = encode({"messages": messages}, encoder_of(name))
    settings_ = {"date_string": "01 Jan 2025"} if name == "llama31" else {}
    theirs = reference.apply_chat_template(messages, tokenize=True, return_dict=True, **settings_)["input_ids"]
    assert ours.ids.tolist() == theirs
    prompt = Prompt(tuple(messages[:-1]), None, "")
    generation = reference.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, **settings_
    )
    assert encode_prompt(prompt, encoder_of(name)) == generation["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_of_training_is_prompt_of_generation(name: str) -> None:
    """What is given at generation is what stands before the first learnt token in training."""
    family, encoder = FAMILIES[name], encoder_of(name)
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."}]
    encoded = encode({"messages": messages}, encoder)
    first = encoded.trained.tolist().index(True)
    prompt = encode_prompt(Prompt(tuple(messages[:1]), None, ""), encoder)
    assert encoded.ids.tolist()[:first] == prompt
    assert family.bos is None or prompt.count(encoder.facts.bos_id) <= 1 or name == "smollm2"


@pytest.mark.parametrize("name", FAMILIES)
def test_one_beginning_also_where_the_tokenizer_adds_its_own(name: str) -> None:
    family = FAMILIES[name]
    if family.bos is None or name == "smollm2":
        return
    encoder = encoder_of(name, adds_bos=True)
    bos = encoder.facts.bos_id
    chat = encode({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}, encoder)
    assert chat.ids.tolist().count(bos) == (1 if family.template is None or "bos_token" in family.template else 0)
    plain = encode({"text": "Hello world"}, encoder, "text")
    assert plain.ids[0] == bos and plain.ids.tolist().count(bos) == 1
    assert plain.ids[-1] == encoder.facts.eos_id and plain.trained.tolist() == [False] + [True] * (len(plain.ids) - 1)
    again = encode({"text": family.bos + "Hello world"}, encoder, "text")
    assert again.ids.tolist().count(bos) == 1
    prompt = encode_prompt(Prompt(None, None, "Hello"), encoder)
    assert prompt.count(bos) == 1 and prompt[0] == bos


@pytest.mark.parametrize("name", ["chatml", "chatml_marked", "llama3", "llama2", "qwen3"])
def test_last_answer_and_marked_messages(name: str) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two", "train": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "three"},
    ]
    encoder = encoder_of(name)
    assert [
        ("one" in run, "two" in run, "three" in run)
        for run in trained_runs(encode({"messages": messages}, encoder), encoder)
    ] == [
        (True, False, False),
        (False, False, True),
    ]
    last = encoder_of(name, "last_answer")
    (run,) = trained_runs(encode({"messages": messages}, last), last)
    assert "three" in run and "one" not in run
    everything = encode({"messages": messages}, encoder_of(name, "all"))
    assert everything.trained.tolist() == [False] + [True] * (len(everything.ids) - 1)


@pytest.mark.parametrize("name", ["chatml", "qwen2", "chatml_marked"])
def test_an_answer_that_spells_the_turn_end(name: str) -> None:
    """A turn end inside the text of an answer does not end it."""
    messages = [
        {"role": "user", "content": "How does ChatML end a turn?"},
        {"role": "assistant", "content": "With <|im_end|>, like this: <|im_end|>."},
        {"role": "user", "content": "And <|im_end|> in a question?"},
        {"role": "assistant", "content": "No."},
    ]
    encoder = encoder_of(name)
    assert trained_runs(encode({"messages": messages}, encoder), encoder) == [
        "With <|im_end|>, like this: <|im_end|>.<|im_end|>",
        "No.<|im_end|>",
    ]


def test_tool_calls_and_reasoning() -> None:
    encoder = encoder_of("qwen3")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": "ü"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is 2.", "reasoning_content": "easy"},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
    }
    encoded = encode(row, encoder)
    assert trained_runs(encoded, encoder) == [
        '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "ü"}}\n</tool_call><|im_end|>',
        "<think>\neasy\n</think>\n\nIt is 2.<|im_end|>",
    ]
    whole = core_tokenizer(encoder.facts.core).decode(encoded.ids.tolist(), skip_special_tokens=False)
    assert "# Tools" in whole and "<tool_response>\n2\n</tool_response>" in whole


def test_answer_first_and_blanks_at_the_border() -> None:
    """A conversation that starts with the assistant, and answers whose blanks a tokenizer would join to the prompt's."""
    encoder = encoder_of("chatml")
    messages = [
        {"role": "assistant", "content": "\n\n Hello"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "\n\ty "},
    ]
    assert trained_runs(encode({"messages": messages}, encoder), encoder) == [
        "\n\n Hello<|im_end|>",
        "\n\ty <|im_end|>",
    ]


def test_what_cannot_be_said_for_certain_is_refused() -> None:
    folder = write_tokenizer(Path(mkdtemp()), FAMILIES["chatml"])
    upper = CHATML.replace("message['content'] +", "message['content'] | upper +")
    (folder / "chat_template.jinja").write_text(upper)
    encoder = make_encoder(load_facts(folder), data_config())
    with pytest.raises(NotRendered, match="is not what the chat template renders"):
        encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]}, encoder)
    with pytest.raises(NotRendered, match="must alternate"):
        encode({"messages": [{"role": "assistant", "content": "a"}]}, encoder_of("llama2"))
    with pytest.raises(NotRendered, match="noncharacter"):
        encode(
            {"messages": [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "a"}]},
            encoder_of("chatml"),
        )


def test_turn_end_that_no_special_token_closes_is_seen() -> None:
    folder = write_tokenizer(Path(mkdtemp()), FAMILIES["chatml"])
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "### ").replace("<|im_end|>", ""))
    encoder = make_encoder(load_facts(folder), data_config())
    encoded = encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]}, encoder)
    assert encoded.num_open_ends == 1 and trained_runs(encoded, encoder) == ["yes\n"]


def test_plain_prompt_and_completion_keep_the_tokens_of_generation() -> None:
    encoder = encoder_of("chatml")
    encoded = encode({"prompt": "Q: 1+1?\nA: ", "completion": "42"}, encoder, "prompt_completion")
    assert trained_runs(encoded, encoder) == ["42<|im_end|>"]
    first = encoded.trained.tolist().index(True)
    assert encoded.ids.tolist()[:first] == encode_prompt(Prompt(None, None, "Q: 1+1?\nA: "), encoder)


def test_marks_of_trl_agree() -> None:
    """TRL's training templates with their own marks, and the same without marks: the same answers are learnt."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    compared = 0
    for name, marks in (
        ("qwen2_5", "chatml"),
        ("qwen3", "qwen3"),
        ("llama3", "llama3"),
        ("gemma", "gemma"),
        ("phi3", "phi3"),
    ):
        messages = [
            {"role": "user", "content": "How are you?"},
            {"role": "assistant", "content": "I am fine."},
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "It is 42."},
        ]
        runs: list[list[str]] = []
        for suffix in ("", "_training"):
            path = folder / f"{name}{suffix}.jinja"
            if not path.exists():
                continue
            tokenizer = write_tokenizer(Path(mkdtemp()), FAMILIES[marks])
            (tokenizer / "chat_template.jinja").write_text(path.read_text())
            encoder = make_encoder(load_facts(tokenizer), data_config())
            runs.append(trained_runs(encode({"messages": messages}, encoder), encoder))
        if len(runs) == 2:
            compared += 1
            assert runs[0][-1] == runs[1][-1]
            assert len(runs[0]) == len(runs[1]) == 2
    assert compared >= 4


def test_our_renderer_is_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from orchestrator.data.encoding.chat_template import ChatTemplate

    messages = [
        {"role": "system", "content": " Be <b>short</b> & clear "},
        {"role": "user", "content": "ä\n"},
        {
            "role": "assistant",
            "content": "</think>x",
            "tool_calls": [{"function": {"name": "f", "arguments": {"ü": [1, None]}}}],
        },
    ]
    compared = 0
    for family in FAMILIES.values():
        if family.template is None or not family.has_system:
            continue
        special = {"bos_token": family.bos or "", "eos_token": family.eos}
        theirs, _ = render_jinja_template(
            [messages], chat_template=family.template, date_string="01 Jan 2025", **special
        )  # type: ignore[arg-type]
        ours = ChatTemplate(family.template, tuple(special.items()), "2025-01-01").render(
            messages, None, add_generation_prompt=False
        )
        assert ours == theirs[0]
        compared += 1
    assert compared >= 10
    assert QWEN3 and Chat

"""Columns that others name otherwise, rows that train nothing in their stage, and the line of every fault."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from command_line import Asker, latest, write_model, write_rows

from orchestrator.config.data import DataFormat
from orchestrator.data.formats.columns import detect, suggested
from orchestrator.data.formats.examples import Chat
from orchestrator.data.formats.parse import parse_row
from orchestrator.data.sources.readers import file_kind, position, read_rows

STAGES = {
    "sft": "llama_lora",
    "dpo": "llama_dpo",
    "reward": "llama_reward",
    "grpo": "llama_rlhf",
    "classify": "llama_classify",
}
Case = tuple[str, dict[str, Any], str | None]
"""Stage, a row, the mapping that the refusal offers (None: the rows are taken as they are)."""
CASES: list[Case] = [
    ("sft", {"prompt": "p", "response": "r"}, "{instruction: prompt, output: response}"),
    ("sft", {"question": "p", "answer": "r"}, "{instruction: question, output: answer}"),
    ("sft", {"Question": "p", "Answer": "r", "id": 3}, "{instruction: Question, output: Answer}"),
    ("sft", {"instruction": "p", "response": "r"}, "{output: response}"),
    ("sft", {"instruction": "p", "context": "c", "response": "r"}, "{output: response, input: context}"),
    ("sft", {"input": "p", "output": "r"}, "{instruction: input}"),
    ("sft", {"query": "p", "response": "r"}, "{instruction: query, output: response}"),
    ("sft", {"problem": "p", "solution": "r"}, "{instruction: problem, output: solution}"),
    ("sft", {"prompt": "p", "answer": "r"}, "{instruction: prompt, output: answer}"),
    ("sft", {"system_prompt": "s", "question": "p", "response": "r"}, "{instruction: question, output: response, system: system_prompt}"),
    ("sft", {"prompt": "p", "chosen": "a", "rejected": "b"}, "{instruction: prompt, output: chosen}"),
    ("sft", {"chosen": "p a", "rejected": "p b"}, "{text: chosen}"),
    ("sft", {"prompt": "p", "extra": 1}, "{instruction: prompt, output: COLUMN}"),
    ("sft", {"text": "t", "label": "x"}, "{instruction: text, output: label}"),
    ("sft", {"instruction": "p", "output": "r"}, None),
    ("sft", {"prompt": "p", "completion": "r"}, None),
    ("sft", {"text": "t"}, None),
    ("dpo", {"question": "p", "chosen": "a", "rejected": "b"}, "{prompt: question}"),
    ("dpo", {"source": "hh", "chosen": "p a", "rejected": "p b"}, None),
    ("dpo", {"prompt": "p", "chosen_response": "a", "rejected_response": "b"}, "{chosen: chosen_response, rejected: rejected_response}"),
    ("reward", {"question": "p", "preferred": "a", "dispreferred": "b"}, "{prompt: question, chosen: preferred, rejected: dispreferred}"),
    ("grpo", {"question": "p", "answer": "42"}, "{prompt: question}"),
    ("grpo", {"prompt": "p", "answer": "42"}, None),
    ("classify", {"review": "t", "sentiment": "good"}, "{text: review, label: sentiment}"),
    ("classify", {"sentence": "t", "label": 1}, "{text: sentence}"),
    ("classify", {"text": "t", "label": 1}, None),
]  # fmt: skip


def words_of(folder: Path, stage: str, row: Mapping[str, Any]) -> list[str]:
    write_rows(folder / "rows.jsonl", [row] * 8)
    base = folder / "base"
    return [
        f"+experiment={STAGES[stage]}",
        f"model.base={base if base.exists() else write_model(base)}",
        f"stages.{stage}.data.train.path=rows.jsonl",
        f"stages.{stage}.data.eval.path=none",
    ]


@pytest.mark.parametrize(("stage", "row", "mapping"), CASES)
def test_rows_that_a_stage_cannot_train_are_refused_with_the_mapping(
    ask: Asker, stage: str, row: dict[str, Any], mapping: str | None
) -> None:
    words = words_of(ask.folder, stage, row)
    if mapping is None:
        assert ask("plan", *words).code == 0
        return
    told = "\n".join(ask.refused("plan", *words))
    (offered,) = set(re.findall(r"stages\.\w+\.data\.train\.columns='[^']*'", told))
    assert offered == f"stages.{stage}.data.train.columns='{mapping}'"
    if "COLUMN" not in mapping:
        answer = ask("plan", *words, *shlex.split(offered))
        assert answer.code == 0, answer.errors


def test_feedback_is_no_sft(ask: Asker) -> None:
    (told,) = ask.refused("plan", *words_of(ask.folder, "sft", {"prompt": "p", "completion": "r", "label": False}))
    assert "the bad ones would be trained on too" in told and "data.train.format=prompt_completion" in told


def test_a_mapping_is_obeyed_or_refused(ask: Asker) -> None:
    row = {"prompt": "p", "completion": "r"}
    assert detect(row, {"instruction": "prompt", "output": "completion"}) == "alpaca"
    assert detect(row, {}) == "prompt_completion"
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for side in parse_row(pair, "preference", {"instruction": "prompt"}).documents:
        assert isinstance(side, Chat) and side.messages[0] == {"role": "user", "content": "p"}
    (chat,) = parse_row({"input": "p", "output": "r"}, "alpaca", {"instruction": "input"}).documents
    assert isinstance(chat, Chat) and chat.messages[0]["content"] == "p", "not the input a second time"
    (chat,) = parse_row({"instruction": "p", "output": "r"}, "alpaca", {"input": "instruction"}).documents
    assert isinstance(chat, Chat) and chat.messages[0]["content"] == "p\n\np", "asked for twice"
    words = words_of(ask.folder, "sft", row)
    key = "stages.sft.data.train.columns"
    assert ask.refused("plan", *words, f"{key}={{instruction: promt, output: completion}}") == (
        f"{key}: instruction: promt: the file has no such column; did you mean prompt?",
    )
    (told,) = ask.refused("plan", *words, f"{key}={{instructon: prompt}}")
    assert told.startswith(f"{key}: instructon: format prompt_completion has no such field")


def test_plain_prompts_on_a_base_with_a_template_are_named(ask: Asker) -> None:
    words = words_of(ask.folder, "sft", {"prompt": "p", "completion": "r"})

    def warnings(*more: str) -> list[str]:
        answer = ask("plan", *words, *more, "format=json")
        assert answer.code == 0, answer.errors
        return [line for line in json.loads(answer.out)["warnings"] if "template" in line]

    assert warnings() == [], "the tokenizer has no template"
    (ask.folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (told,) = warnings()
    offered = "stages.sft.data.train.columns='{instruction: prompt, output: completion}'"
    assert told.endswith(f"to apply the template type {offered}")
    assert warnings(*shlex.split(offered)) == []


def test_suggestions_need_two_columns() -> None:
    assert suggested(["question"], "text") is None and suggested(["answer"], "text") is None
    assert suggested(["label"], "class") is None and suggested(["chosen"], "pair") is None
    kinds: dict[DataFormat, dict[str, Any]] = {"alpaca": {"instruction": "i", "output": "o"}}
    assert all(detect(row) == name for name, row in kinds.items())


ODD = ['say "a"\nand b', "plain", "three\nlines\nhere"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_csv_rows_are_numbered_by_their_first_line(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerow(["instruction", "output"])
        writer.writerows([[text, str(number)] for number, text in enumerate(ODD)])
        writer.writerow(["cut short"])
        writer.writerow([])
        writer.writerow(["last", "x"])
    kind = file_kind(tmp_path / name)
    assert kind is not None
    rows = list(read_rows(tmp_path / name, kind))
    lines = (tmp_path / name).read_text().splitlines()
    assert [number for number, _ in rows] == [2, 4, 5, 8, 10]
    for number, row in rows[:3]:
        first = cast("dict[str, str]", row)["instruction"].split()[0]
        assert first in lines[number - 1]


def test_json_rows_are_numbered_by_their_line_or_counted(tmp_path: Path) -> None:
    rows = [{"instruction": f"i{n}", "list": [n, {"x": "]"}], "output": "a\nb [,"} for n in range(4)]
    for head in ("", '{"version": {"a": [1]}, "data":\n'):
        path = tmp_path / f"{len(head)}.json"
        path.write_text(head + json.dumps(rows, indent=2) + ("}" if head else ""))
        lines = path.read_text().splitlines()
        found = list(read_rows(path, "json"))
        assert [row for _, row in found] == rows
        for number, row in found:
            assert isinstance(row, dict) and lines[number - 1].strip() == "{"
            assert f'"{row["instruction"]}"' in lines[number]
    flat = tmp_path / "flat.json"
    flat.write_text(json.dumps(rows))
    assert [position(flat, number) for number, _ in read_rows(flat, "json")] == [
        f"{flat} row {n}" for n in (1, 2, 3, 4)
    ]
    empty = tmp_path / "empty.json"
    empty.write_text(" [ ] ")
    assert list(read_rows(empty, "json")) == []


def test_a_fault_names_the_line_of_the_file(ask: Asker) -> None:
    words = words_of(ask.folder, "sft", {})
    (ask.folder / "rows.csv").write_text('instruction,output\n"two\nlines",fine\nquestion,\n')
    told = ask.refused("run", *latest([*words, "stages.sft.data.train.path=rows.csv"]))
    assert any(line.startswith(f"{ask.folder / 'rows.csv'}:4 output is empty") for line in told), told

"""What README and docs print can be typed: every row of README's table is planned, every command is composed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ROW, Asker, write_rows

from orchestrator.cli.verbs import VERBS
from orchestrator.composition.compose import examine
from orchestrator.composition.multirun import first_overrides
from orchestrator.composition.node_counts import take_node_counts

ROOT = Path(__file__).resolve().parents[2]
RUN_ELSEWHERE = ("errors.md", "first_hour.md")
"""Pages whose commands, refused ones among them, are run by a test of their own."""
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in RUN_ELSEWHERE),
]
MAIN = "+experiment=llama_lora"
SPAN = re.compile(r"`([^`]+)`")
COMPOSING = ("run", "plan", "check", "prepare", "render", "verify-resume")
"""Verbs that take overrides; the others take a run folder."""
EXPLAINED = re.compile(r"\s{3,}[A-Za-z].*$| \.\.\.\s.*$")
"""Words that explain a command in the column after it."""


def wants() -> list[tuple[str, str]]:
    """The rows of README's table `want | type`."""
    table = PAGES[0].read_text(encoding="utf-8").split("| want | type |\n|---|---|\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == len(table.strip().splitlines())
    return rows


def spans(cell: str) -> list[list[str]]:
    """The words of every way to type it: a bare name has the key of the one before it, or is the name of a stage."""
    found: list[list[str]] = []
    key = ""
    for text in SPAN.findall(cell):
        words = shlex.split(text)
        if len(words) == 1 and "=" not in words[0]:
            words = [f"{key}={words[0]}" if key else f"+stage@stages.more={words[0]}"]
        elif len(words) == 1:
            key = words[0].partition("=")[0]
        found.append(words)
    return found


WANTS = wants()


def test_the_table_was_read() -> None:
    assert len(WANTS) >= 18
    assert sum(len(spans(cell)) for _, cell in WANTS) >= 28
    assert [want for want, cell in WANTS if not spans(cell)] == ["stop and save"]


@pytest.mark.parametrize(("want", "cell"), [row for row in WANTS if spans(row[1])], ids=lambda text: text[:30])
def test_a_row_of_the_table_works_as_typed(ask: Asker, want: str, cell: str) -> None:
    for words in spans(cell):
        verb = words.pop(0) if words[0] in COMPOSING else "plan"
        words = [word for word in words if word != "..."]
        experiment = [] if any(word.startswith("+experiment=") for word in words) else [MAIN]
        answer = ask(verb, *experiment, *words)
        assert answer.code == 0, (want, words, answer.errors)


def test_the_table_of_verbs_has_every_verb() -> None:
    table = PAGES[0].read_text(encoding="utf-8").split("| verb | does |\n|---|---|\n")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in SPAN.findall(row.split(" | ")[0])}
    assert named == {verb.name for verb in VERBS.values() if verb.group}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's blocks, without what explains it."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            command = re.match(r"(?:python -m )?orchestrator\s+(.*)", line.strip().removeprefix("$ "))
            if command is not None:
                without = EXPLAINED.sub("", re.sub(r"\s+#.*$", "", command[1]))
                yield shlex.split(without)


def code_of(page: Path, function: str) -> str:
    """The block of the page that defines a function."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if f"def {function}(" in block]
    return block


def overrides(words: list[str]) -> list[str]:
    """What is composed: options, `format=`, `advise=`, `steps=` and lists of nodes are the verbs' own."""
    kept: list[str] = []
    rest = iter([word for word in words if not word.startswith(("format=", "advise=", "steps="))])
    for word in rest:
        if word in ("--only", "--from", "--config-dir"):
            next(rest)
        elif not word.startswith("-") or word == "-m":
            kept.append(word.replace("+experiment=NAME", MAIN))
    return take_node_counts(first_overrides(kept))[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_compose(ask: Asker, page: Path) -> None:
    for words in commands(page):
        verb = words.pop(0) if words and words[0] in VERBS else "run"
        if verb not in COMPOSING or (verb == "prepare" and words[0].startswith("runs/")):
            continue
        files = [word for word in words if word.endswith(".yaml")]
        assert "=" in " ".join(words) or files or not words, (page.name, verb, words)
        for name in files:  # the file that the page has the reader write first
            assert ask("init", name, "--force").code == 0, (page.name, words)
        for name in re.findall(r"[\w/]+\.jsonl", " ".join(words)):
            write_rows(ask.folder / name, [ROW] * 4)
        for name, function in re.findall(r"(\w+\.py):(\w+)", " ".join(words)):
            (ask.folder / name).write_text(code_of(page, function))
        composed = examine(overrides(words))
        assert composed.problems == [], (page.name, words)


def test_the_commands_were_found() -> None:
    """A page whose blocks are not read would pass in silence."""
    assert len([words for page in PAGES for words in commands(page)]) >= 48

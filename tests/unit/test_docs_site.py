"""Pages that are generated or list facts of the code are up to date; the commands of docs/errors.md answer as the page says."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import Asker, write_rows

from orchestrator import errors
from orchestrator.cli.verbs import GROUPS, VERBS
from orchestrator.run_folder.folder import RunFolder, StageFolder

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HOME = "/home/you/orchestrator"
"""Working folder in the answers of the pages."""
BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```)", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ python -m orchestrator (?P<words>.*?)(?:\s+# exit code (?P<code>\d+))?$")
SECTIONS = re.findall(
    r"^## ([^\n]+)\n(?:(?!## )[^\n]*\n)*?```console", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE
)
"""Sections of docs/errors.md that show commands, one block in each."""
UNCOMPARED = "..."
"""Stands in a page for output that depends on the machine."""


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def script(name: str) -> dict[str, Any]:
    """The names that a script of docs/ defines."""
    return runpy.run_path(str(DOCS / name))


def test_the_page_of_verbs_is_what_the_parser_says() -> None:
    page = script("make_verbs.py")["page"]()
    assert read("verbs.md") == page, "docs/verbs.md is not what the parser says: type make docs-verbs"
    headings = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert sorted(headings) == sorted(verb.name for verb in VERBS.values() if verb.group in GROUPS)


def test_the_page_and_the_picture_of_packages_are_the_import_contract() -> None:
    make = script("make_architecture.py")
    hint = "is not what pyproject.toml and the docstrings say: type make docs-architecture"
    page = read("architecture.md")
    assert page == make["page"](page), f"docs/architecture.md {hint}"
    assert read("images/packages.svg") == make["picture"](), f"docs/images/packages.svg {hint}"
    packages = {folder.parent.name for folder in (ROOT / "orchestrator").glob("*/__init__.py")}
    assert len(packages) > 20 and packages <= {name for layer in make["layers"]() for name in layer}


def test_the_page_of_the_run_folder_has_every_file() -> None:
    page = read("run_folder.md")
    run = RunFolder(Path("run"))
    values = [getattr(files, name) for files in (run, run.stage("S")) for name in properties(type(files))]
    paths = [value for value in values if isinstance(value, Path)]
    names = {path.relative_to(run.root / "S" if "S" in path.parts else run.root) for path in paths}
    assert len(names) > 30
    assert [str(name) for name in names if f"`{name}`" not in page and f"`{name}/`" not in page] == []


def properties(kind: type[RunFolder | StageFolder]) -> list[str]:
    return [name for name, value in vars(kind).items() if isinstance(value, property)]


def test_the_page_of_errors_has_every_exit_code() -> None:
    codes = {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert set(re.findall(r"^\| (\d+) \|", read("errors.md"), re.MULTILINE)) == codes


@pytest.mark.parametrize("section", SECTIONS)
def test_the_answers_on_the_page_of_errors(ask: Asker, request: pytest.FixtureRequest, section: str) -> None:
    """`make golden` writes them."""
    write_rows(ask.folder / "rows.jsonl", [{"question": "Which colour?"}] * 4)
    page = read("errors.md")
    start = page.index(f"## {section}\n")
    block = BLOCK.search(page, start)
    assert block is not None
    answered = answers(ask, block[0])
    assert "\nerror: " in answered
    if request.config.getoption("--refresh-golden"):
        (DOCS / "errors.md").write_text(page[: block.start()] + answered + page[block.end() :], encoding="utf-8")
    else:
        assert block[0] == answered, "docs/errors.md: read the difference; if it is meant, type make golden"


def test_every_block_of_the_page_of_errors_is_run() -> None:
    assert len(SECTIONS) == len(BLOCK.findall(read("errors.md"))) == 6


def answers(ask: Asker, block: str) -> str:
    """The block with what its commands print on stderr now; a command is refused with 2 unless its remark says otherwise."""
    lines: list[str] = []
    for line in block.splitlines():
        command = COMMAND.match(line)
        if command is None:
            lines += [line] * (line == UNCOMPARED)
            continue
        answer = ask(*shlex.split(command["words"]))
        assert answer.code == int(command["code"] or errors.EXIT_USER), (line, answer)
        lines.append(line)
        if answer.code != errors.EXIT_DONE:
            lines += [f"error: {text}".replace(str(ask.folder), HOME) for text in answer.errors]
    return "".join(f"{line}\n" for line in lines)


def test_links_that_leave_docs_lead_to_a_copy() -> None:
    hooks, copied = script("site_hooks.py"), set[str]()
    text = (
        "[a](data.md#figures) [b](../README.md) [c](../orchestrator/errors.py) [d](../nothing.py) [e](https://a.b/c.md)"
    )
    assert hooks["rewrite"](text, source="docs/page.md", copied=copied) == (
        "[a](data.md#figures) [b](index.md) [c](repository/orchestrator/errors.py) [d](../nothing.py) [e](https://a.b/c.md)"
    )
    assert copied == {"orchestrator/errors.py"}
    assert hooks["rewrite"]("[a](docs/data.md)", source="README.md", copied=copied) == "[a](data.md)"
    assert [
        bool(hooks["FETCHED"].search(tag)) for tag in ('<script src="https://a.b/c">', '<a href="https://a.b">')
    ] == [
        True,
        False,
    ]

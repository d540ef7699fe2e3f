"""Write the table of docs/architecture.md and docs/images/packages.svg from the import contracts. `make docs-architecture` runs it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "packages.svg"
BEGIN, END = "<!-- packages: written by make docs-architecture -->\n", "<!-- end of packages -->\n"
LAYERS, LOGIN_SIDE = "the packages are layered", "no torch on the login side"
"""Names of the contracts that are read."""
PREFIX = "orchestrator."
COLOURS = {"no": "#cfe3f7", "yes": "#f9dcc4", "in parts": "#e2d8f3"}
"""Of a box, by whether its package may import the training libraries: torch, transformers, DeepSpeed and so on."""
BOX_WIDTH, BOX_HEIGHT, GAP, MARGIN = 160, 30, 10, 16
"""Pixels."""
SEPARATE = "launchers", "slurm"


def contracts() -> dict[str, dict[str, Any]]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["name"]: contract for contract in pyproject["tool"]["importlinter"]["contracts"]}


def layers() -> list[list[str]]:
    """Packages and modules without `orchestrator.`, the top layer first."""
    return [[name.strip().removeprefix(PREFIX) for name in layer.split("|")] for layer in contracts()[LAYERS]["layers"]]


def may_import_training_libraries(package: str) -> str:
    """yes or no; "in parts" for a package some of whose subpackages may."""
    name = PREFIX + package
    without: list[str] = contracts()[LOGIN_SIDE]["source_modules"]
    if name in without:
        return "no"
    return "in parts" if any(module.startswith(f"{name}.") for module in without) else "yes"


def question(package: str) -> str:
    """The first sentence of the docstring of a package or module."""
    folder = ROOT / "orchestrator" / package
    source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    assert docstring, f"{source} has no docstring"
    return docstring.split("\n\n")[0].replace("\n", " ")


def page(current: str) -> str:
    """docs/architecture.md with its table as the contracts and docstrings have it; the rest as it is in `current`."""
    before, rest = current.split(BEGIN)
    after = rest.split(END)[1]
    rows = [
        f"| `{package}` | {question(package).replace('|', chr(92) + '|')} | {may_import_training_libraries(package)} |"
        for layer in layers()
        for package in layer
    ]
    table = "\n".join(["| package | question | training libraries |", "|---|---|---|", *rows])
    return f"{before}{BEGIN}\n{table}\n\n{END}{after}"


def picture() -> str:
    """The layers as an SVG, a row for each."""
    rows = layers()
    width = 2 * MARGIN + max(len(row) for row in rows) * (BOX_WIDTH + GAP) - GAP
    height = 2 * MARGIN + (len(rows) + 3) * (BOX_HEIGHT + GAP) - GAP
    body: list[str] = []
    for index, row in enumerate(rows):
        colours = [COLOURS[may_import_training_libraries(package)] for package in row]
        body += boxes(row, colours, top=MARGIN + index * (BOX_HEIGHT + GAP), width=width)
    line = MARGIN + len(rows) * (BOX_HEIGHT + GAP)
    body.append(
        text("packages of their own, which import nothing of orchestrator:", x=width / 2, y=line + BOX_HEIGHT / 2)
    )
    body += boxes(SEPARATE, ["#ececec"] * 2, top=line + BOX_HEIGHT + GAP, width=width)
    legend = ["no training libraries", "training libraries", "in parts"]
    body += boxes(legend, list(COLOURS.values()), top=line + 2 * (BOX_HEIGHT + GAP), width=width, stroke="none")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' font-family="sans-serif" font-size="13">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def boxes(
    names: Sequence[str], colours: Sequence[str], *, top: float, width: float, stroke: str = "#555555"
) -> Iterator[str]:
    """A centred row of boxes."""
    left = (width - len(names) * (BOX_WIDTH + GAP) + GAP) / 2
    for name, colour in zip(names, colours, strict=True):
        yield (
            f'<rect x="{left:g}" y="{top:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4"'
            f' fill="{colour}" stroke="{stroke}"/>'
        )
        yield text(name, x=left + BOX_WIDTH / 2, y=top + BOX_HEIGHT / 2)
        left += BOX_WIDTH + GAP


def text(content: str, *, x: float, y: float) -> str:
    return f'<text x="{x:g}" y="{y + 4.5:g}" text-anchor="middle" fill="#111111">{escape(content)}</text>'


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")

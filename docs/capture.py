"""Write an SVG picture of what a command shows on a terminal: python docs/capture.py docs/images/NAME.svg [--keep-last N] -- COMMAND.

The command runs on a real pseudo-terminal, so that it draws its bars and colours; the picture is the screen at its end. Needs
the package pyte (pip install pyte), which nothing else here uses.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import shlex
import struct
import sys
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROWS = 400
"""Taller than any output here: nothing scrolls away."""
COLOURS = {"brown": "yellow"}
"""pyte's name of a colour -> rich's."""


def run(argv: list[str], columns: int) -> pyte.Screen:
    """The screen after the command has ended; what it prints is passed on meanwhile."""
    screen = pyte.Screen(columns, ROWS)
    stream = pyte.ByteStream(screen)
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(ROWS)}
        os.execvp(argv[0], argv)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    while True:
        try:
            output = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            output = b""
        if not output:
            break
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
        stream.feed(output)
    os.waitpid(process, 0)
    return screen


def line_of(screen: pyte.Screen, number: int) -> Text:
    """One row of the screen with its colours; neighbouring cells of one style are one piece of the picture."""
    text = Text()
    cells = [screen.buffer[number][column] for column in range(screen.columns)]
    for style, same in groupby(cells, key=style_of):
        text.append("".join(cell.data for cell in same), style)
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> Style:
    colour = None if cell.fg == "default" else COLOURS.get(cell.fg, cell.fg.replace("bright", "bright_"))
    if colour is not None and len(colour) == 6 and all(digit in "0123456789abcdef" for digit in colour):
        colour = f"#{colour}"
    return Style(color=colour, bold=cell.bold, italic=cell.italics)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--keep-last", type=int, default=None, help="only so many lines, the last ones")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    screen = run(options.command, options.columns)
    lines = [line_of(screen, number) for number in range(ROWS)]
    while lines and not lines[-1].plain:
        lines.pop()
    console = Console(record=True, width=options.columns, file=io.StringIO(), force_terminal=True)
    for line in lines[-options.keep_last :] if options.keep_last else lines:
        console.print(line, soft_wrap=True)
    options.picture.write_text(console.export_svg(title=shlex.join(options.command)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the script that `load it with` prints, as a person pastes it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.loading_code import loading_lines

CARD_SCRIPT = re.compile(r"```python\n(.*?)```", re.DOTALL)


def printed_script(files: StageFolder) -> str:
    """What the end of a stage prints."""
    result = read_json(files.result)
    lines = loading_lines(
        str(files.artifact), kind=result["artifact"]["kind"], base=result["base"]["folder"], folder=files.artifact
    )
    return "\n".join(lines)


def carded_script(folder: Path) -> str:
    """What the card of a folder says."""
    found = CARD_SCRIPT.search((folder / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def pasted(script: str, *, folder: Path) -> str:
    """What a script prints when it is run in a folder."""
    told = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(told):
        exec(compile(script, "pasted", "exec"), {})
    return told.getvalue()


def check_scripts(files: StageFolder, out: str) -> None:
    """The printed and the carded script both run, and do the same."""
    script = printed_script(files)
    assert script in out
    card = (files.artifact / "README.md").read_text(encoding="utf-8")
    assert "More Information" not in card and "proof" in card and "license" in card
    told = pasted(script, folder=files.root)
    assert told.strip() and pasted(carded_script(files.artifact), folder=files.artifact) == told

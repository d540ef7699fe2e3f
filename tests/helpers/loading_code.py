"""Runs the script that `load it with` prints, as if pasted by a user."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.loading_code import loading_lines

CARD_SCRIPT = re.compile(r"```python\n(.*?)```", re.DOTALL)


def printed_script(files: StageFolder) -> str:
    """The script printed at the end of a stage."""
    result = read_json(files.result)
    lines = loading_lines(
        str(files.artifact),
        kind=ArtifactKind(result["artifact"]["kind"]),
        base=result["base"]["folder"],
        folder=files.artifact,
    )
    return "\n".join(lines)


def carded_script(folder: Path) -> str:
    """The script in the card of a folder."""
    found = CARD_SCRIPT.search((folder / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def pasted(script: str, *, folder: Path) -> str:
    """Output of a script run in a folder."""
    told = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(told):
        exec(compile(script, "pasted", "exec"), {})
    return told.getvalue()


def check_scripts(files: StageFolder, out: str) -> None:
    """Check that the printed script and the card's script both run, with the same output."""
    script = printed_script(files)
    assert script in out
    card = (files.artifact / "README.md").read_text(encoding="utf-8")
    assert "More Information" not in card and "proof" in card and "license" in card
    told = pasted(script, folder=files.root)
    assert told.strip() and pasted(carded_script(files.artifact), folder=files.artifact) == told

"""What `make check` covers: pyright reads every file, and all but the packages that use torch strictly."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
LOOSE = "no torch on the login side"
"""The contract that names the packages of the torch side."""


def test_every_file_is_checked_and_the_login_side_strictly() -> None:
    pyright = SETTINGS["pyright"]
    assert "exclude" not in pyright and "ignore" not in pyright and not pyright["enableTypeIgnoreComments"]
    (contract,) = (one for one in SETTINGS["importlinter"]["contracts"] if one["name"] == LOOSE)
    torch_side = [ROOT / name.replace(".", "/") for name in contract["forbidden_modules"] if "." in name]
    torch_side.append(ROOT / "orchestrator/worker.py")
    strict = [ROOT / path for path in pyright["strict"]]
    files = [
        file
        for folder in pyright["include"]
        for file in (ROOT / folder).rglob("*.py*")
        if file.suffix in (".py", ".pyi")
    ]
    assert len(files) > 400
    for file in files:
        is_loose = any(file.is_relative_to(path) for path in torch_side)
        assert any(file.is_relative_to(path) for path in strict) != is_loose, file

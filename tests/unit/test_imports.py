"""bitsandbytes stays out of a process where nothing of its run uses it, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.compose import compose
from orchestrator.training.imports import needs_bitsandbytes


@pytest.mark.parametrize(
    ("words", "config_json", "needed"),
    [
        ((), "{}", False),
        (("quantization=nf4",), "{}", True),
        (("optimizer@stages.sft.optimizer=adamw_8bit",), "{}", True),
        (("optimizer@stages.sft.optimizer=adamw_paged",), "{}", True),
        ((), '{"quantization_config": {"load_in_4bit": true}}', True),
    ],
)
def test_who_needs_it(tmp_path: Path, words: tuple[str, ...], config_json: str, needed: bool) -> None:
    (tmp_path / "config.json").write_text(config_json)
    assert needs_bitsandbytes(compose(["+experiment=llama_lora", *words]), tmp_path) == needed


@pytest.mark.parametrize(("words", "found"), [("", False), ("quantization=nf4", True)])
def test_it_looks_as_if_it_were_not_installed(tmp_path: Path, words: str, found: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys, importlib.util; from pathlib import Path\n"
        "from orchestrator.compose import compose; from orchestrator.training.imports import leave_out_unused\n"
        "leave_out_unused(compose(['+experiment=llama_lora', *sys.argv[2:]]), Path(sys.argv[1]))\n"
        "print(importlib.util.find_spec('bitsandbytes') is not None)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    argv = [sys.executable, "-c", code, str(tmp_path), *words.split()]
    done = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(found)

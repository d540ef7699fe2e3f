"""docs/notebook.ipynb was executed, and its cells still run: here on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import Bench

import orchestrator

NOTEBOOK = Path(orchestrator.__file__).parent.parent / "docs" / "notebook.ipynb"
SMALLER = "overrides.append({smaller!r})\n"


def code_cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_it_was_executed_in_order_without_an_error() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)) and len(cells) >= 8
    assert [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"] == []
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert "/home/" not in NOTEBOOK.read_text(encoding="utf-8")


def test_its_cells_run(bench: Bench, tmp_path: Path) -> None:
    smaller = {"model.base": str(bench.model), "model.dtype": "float32", "output_dir": str(tmp_path / "runs")}
    first, *others = ["".join(cell["source"]) for cell in code_cells()]
    code = "\n".join([first, SMALLER.format(smaller=smaller), *others])
    environment = bench.environment({"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "did you mean stages.sft.optimizer.lr?" in done.stdout and "finished" in done.stdout

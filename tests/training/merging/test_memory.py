"""Merges and soups are streams: they run in an address space that does not hold the models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "merge_memory.py"


def test_a_merge_and_a_soup_fit_into_less_than_their_models(tmp_path: Path) -> None:
    argv = [sys.executable, str(BENCHMARK), "--size", "small", "--folder", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    merge, soup = done.stdout.splitlines()[-2:]
    assert merge.startswith("merge: 456 MiB of models in 320 MiB") and soup.startswith("soup: 515 MiB of models in 320")

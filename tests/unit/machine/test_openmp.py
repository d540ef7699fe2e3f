"""The spin count of OpenMP's threads: ours unless the user chose one, set before torch loads libgomp."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestrator.machine.openmp import SPIN_COUNT, SPINS, limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {SPIN_COUNT: SPINS}),
        ({SPIN_COUNT: "7"}, {SPIN_COUNT: "7"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
    ],
)
def test_the_users_choice_wins(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    limit_spinning(environment)
    assert environment == expected


@pytest.mark.parametrize("module", ["orchestrator.__main__", "orchestrator.worker"])
def test_it_is_set_before_torch_is_loaded(module: str) -> None:
    """Both entries read the variable into their environment on the way to an error, and torch is not there yet."""
    script = f"""
import importlib, os, sys
entry = importlib.import_module({module!r})
sys.argv = ["entry", "--no-such-option"]
try:
    entry.main()
except SystemExit:
    pass
print(os.environ.get({SPIN_COUNT!r}), "torch" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name not in (SPIN_COUNT, "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == f"{SPINS} False"

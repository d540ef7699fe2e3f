"""Another launcher's variables in the shell: the command ignores them and says so; what it starts does not see them."""

from __future__ import annotations

import os
import subprocess
import sys

from orchestrator.machine.process_group import rank_variables

FOREIGN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "10.255.255.1", "TORCHELASTIC_RUN_ID": "x"}


def test_names_of_ranks_are_found() -> None:
    environment = {"HOME": "/home/you", "OMP_NUM_THREADS": "2", **FOREIGN}
    assert rank_variables(environment) == sorted(FOREIGN)


def test_the_command_ignores_them_and_says_so() -> None:
    script = f"""
import os
from orchestrator import __main__ as entry
import sys
sys.argv = ["orchestrator", "--version"]
try:
    entry.main()
except SystemExit:
    pass
print(sorted(name for name in os.environ if name in {sorted(FOREIGN)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **FOREIGN},
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "RANK, TORCHELASTIC_RUN_ID, WORLD_SIZE of another launcher are set in this shell and ignored" in done.stderr

"""Runs the programs of the tests as forks of processes that have imported torch and its kin: imports are paid once, not by each.

`start` is called once for a test session; `environment` goes to the processes that may be forks, and to whatever they start.
The processes, signals, exit codes, files and numbers are those of the programs themselves: `tests/training/test_forking.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ADDRESS = "TESTS_FORK_SERVER"
SITE = Path(__file__).parent / "site"
FRESH = {ADDRESS: "/nowhere"}
"""Variables with which a program is an interpreter of its own, as users run it: for tests of start-up and of whole runs."""


def start() -> Callable[[], None]:
    """Starts the server and says its address to all processes of the tests; what ends it."""
    folder = tempfile.mkdtemp(prefix="fork-", dir="/tmp")  # a short path: unix sockets
    address = f"{folder}/server"
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py")), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    assert server.stdin is not None and server.stdout is not None
    server.stdout.readline()
    os.environ[ADDRESS] = address

    def stop() -> None:
        assert server.stdin is not None and server.stdout is not None
        os.environ.pop(ADDRESS, None)
        server.stdin.close()
        server.wait(timeout=30)
        server.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)

    return stop


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables with which a program, and what it starts, run as forks where a server is there."""
    if ADDRESS not in os.environ:
        return dict(given)
    path = os.pathsep.join(filter(None, [str(SITE), given.get("PYTHONPATH")]))
    return {**given, ADDRESS: os.environ[ADDRESS], "PYTHONPATH": path}

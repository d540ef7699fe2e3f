"""Ranks that their launcher starts a second time within an attempt, and how they meet again. Must not import torch."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping

START = "LAUNCH_START"
"""How often the launcher has started this rank in this attempt, from 1: a second start proves what the first has written."""
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


def start_number(environment: Mapping[str, str]) -> int:
    return int(environment.get(START, "1"))


def fresh_port(environment: Mapping[str, str]) -> int | None:
    """The port at which rank 0 gathers ranks of a second start; None where nothing is gathered, or torchrun's agent does.

    The first one if it is still free: a firewall may know it.
    """
    if "RANK" not in environment or environment.get(AGENT_STORE) == "True":
        return None
    for port in (int(environment.get("MASTER_PORT", "0")), 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("no port is free for the ranks to meet at")


def meet_again(environment: MutableMapping[str, str], *, port: int | None) -> None:
    """Let a rank of a second start meet the others as if for the first time."""
    if port is not None:
        environment["MASTER_PORT"] = str(port)
    elif environment.get(AGENT_STORE) == "True":
        # torch keeps what the ranks agree on below this number: that of the first start is still there.
        environment[RESTARTS] = str(start_number(environment))


def become_second_start(environment: Mapping[str, str]) -> None:
    """Replace this process by a fresh one, where no guard is there to start it; does not return.

    `environment` is that of the first start: libraries have changed their own variables since.
    """
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.execve(sys.executable, sys.orig_argv, {**environment, START: str(start_number(environment) + 1)})

"""Says what a process sees of itself, and ends in the way it was asked to: `python probe.py WAY`."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


def facts() -> dict[str, object]:
    umask = os.umask(0)
    os.umask(umask)
    numbers = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    return {
        "argv": sys.argv,
        "original": sys.orig_argv,
        "path": sys.path,
        "folder": str(Path.cwd()),
        "umask": umask,
        "environment": dict(os.environ),
        "main": [__name__, __file__, sys.modules["__main__"].__dict__["__file__"]],
        "flags": list(sys.flags),
        "ignored": [int(n) for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
        "interrupt": repr(signal.getsignal(signal.SIGINT)).split(" at ")[0],
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "inherited": [number for number in sorted(numbers) if _is_inherited(number)],
        "streams": [[s.encoding, s.errors, s.line_buffering, s.write_through] for s in (sys.stdout, sys.stderr)],
        "read": sys.stdin.read(),
        "limits": [resource.getrlimit(limit) for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)],
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def _is_inherited(number: int) -> bool:
    try:
        return not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False


def main() -> None:
    way = sys.argv[1]
    if way == "facts":
        print(json.dumps(facts(), sort_keys=True))
    elif way == "wait":
        signal.signal(signal.SIGUSR1, lambda *_: print("USR1", flush=True))
        Path(sys.argv[2]).write_text(f"{os.getpid()}\n")
        for _ in range(6000):
            time.sleep(0.1)
    elif way.startswith("signal"):
        os.kill(os.getpid(), int(way.removeprefix("signal")))
    elif way == "raise":
        raise ValueError("as asked")
    elif way == "interrupt":
        raise KeyboardInterrupt
    else:
        print("to stderr", file=sys.stderr)
        sys.exit(int(way) if way.isdigit() else way)


if __name__ == "__main__":
    main()

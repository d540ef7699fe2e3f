"""A process that has imported what programs of one kind import, and becomes such a program in a fork for each request.

As a program: `python [-P] zygote.py SOCKET_NUMBER PRELOAD`. It has one thread, no process group of torch and no random numbers
drawn, so that a fork differs from a fresh interpreter in its parent, its session and its hash seed alone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1
OUR_FOLDER = str(Path(__file__).resolve().parent)
LEFT_OUT = {"light": ("deepspeed", "bitsandbytes"), "sharded": ("bitsandbytes",), "quantised": ("deepspeed",)}
"""As `orchestrator.distributed.import_blocking` leaves them out, which must come before the imports."""
TORCH = (
    *(
        "torch",
        "torch.distributed.run",
        "torch.utils.data",
        "accelerate",
        "accelerate.utils",
        "transformers",
        "peft",
        "rich.console",
    ),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.generation"),
    *(
        "orchestrator.worker",
        "orchestrator.stages.sft",
        "orchestrator.preflight.main",
        "orchestrator.evaluation.artifact_proof",
    ),
    *("orchestrator.evaluation.compare_with_base", "orchestrator.merging.export"),
)
PRELOADED = {
    "login": (
        "hydra",
        "hydra.core.global_hydra",
        "orchestrator.config.run",
        "rich.console",
        "rich.table",
        "rich.progress",
    ),
    "agent": ("torch.distributed.run", "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend"),
    "light": TORCH,
    "sharded": ("torch", "deepspeed", *TORCH, "accelerate.utils.deepspeed"),
    "quantised": ("torch", "bitsandbytes", *TORCH),
    "whole": ("torch", "deepspeed", "bitsandbytes", *TORCH, "accelerate.utils.deepspeed"),
}
LOGIN_PACKAGES = (
    *("orchestrator", "launchers", "slurm"),
    *(
        f"orchestrator.{name}"
        for name in (
            *("files", "text", "installation", "config", "run_folder", "machine", "composition", "architecture"),
            *("data.sources", "data.formats", "data.prepared", "run_state", "estimate", "planning", "monitoring"),
            *("display", "execution", "housekeeping", "commands", "cli"),
        )
    ),
)
NOT_LOGIN = ("orchestrator.__main__", "orchestrator.worker")


def _preload(kind: str) -> None:
    gc.disable()  # imports leave nothing to collect, and the collector would look at all again and again
    for name in LEFT_OUT.get(kind, ()):
        sys.modules[name] = None  # type: ignore[assignment]
    for name in (*PRELOADED[kind], *(_login_modules() if kind == "login" else ())):
        importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()  # a fork that looks for garbage would else copy every page it looks at


def _login_modules() -> list[str]:
    names: list[str] = []
    for package in LOGIN_PACKAGES:
        module = importlib.import_module(package)
        if hasattr(module, "__path__"):
            names += [f"{package}.{found.name}" for found in pkgutil.iter_modules(module.__path__) if not found.ispkg]
    return [name for name in names if name not in NOT_LOGIN and not name.endswith("__main__")]


def _serve(server: socket.socket) -> dict[str, Any]:
    """Forks for every request; returns the request in the fork, and never in the zygote."""
    from server import receive  # the folder of this file, on the path while the imports are made

    running: dict[int, tuple[int, socket.socket]] = {}  # by the handle of the process: its number, its caller
    while True:
        callers = {caller.fileno(): handle for handle, (_, caller) in running.items()}
        ready, _, _ = select.select([server.fileno(), *running, *callers], [], [])
        for number in ready:
            if number in running:
                _answer(*running.pop(number), handle=number)
            elif number in callers and callers[number] in running:  # it died, or it was killed
                with suppress(ProcessLookupError):
                    os.killpg(running[callers[number]][0], signal.SIGKILL)
                _answer(*running.pop(callers[number]), handle=callers[number])
        if server.fileno() not in ready:
            continue
        try:
            message, (caller, *descriptors) = receive(server)
        except EOFError:
            os._exit(0)
        process = os.fork()
        if process == 0:
            for _, other in running.values():
                other.close()
            for handle in running:
                os.close(handle)
            server.close()
            os.close(caller)
            return _request(message, descriptors)
        for number in descriptors:
            os.close(number)
        connection = socket.socket(fileno=caller)
        running[os.pidfd_open(process)] = (process, connection)
        with suppress(OSError):
            connection.sendall(process.to_bytes(4, "little"))


def _answer(process: int, caller: socket.socket, *, handle: int) -> None:
    _, status = os.waitpid(process, 0)
    os.close(handle)
    with caller, suppress(OSError):
        caller.sendall(status.to_bytes(4, "little"))


def _request(message: bytes, descriptors: list[int]) -> dict[str, Any]:
    import marshal

    request: dict[str, Any] = marshal.loads(message)
    request["received"] = descriptors
    return request


def _become(request: dict[str, Any]) -> None:
    """Takes over what a new process has from its caller: session, descriptors, folder, environment, arguments, signals."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no fork outlives the zygote, which alone waits for it
    _take_descriptors(request)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["program"][1], *request["arguments"]]
    sys.orig_argv = request["original"]
    sys.path[:] = request["path"]
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, 32, 33}:
        signal.signal(number, signal.SIG_IGN if int(number) in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def _take_descriptors(request: dict[str, Any]) -> None:
    import fcntl

    high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 700) for number in request["received"]]
    for number in request["received"]:
        os.close(number)
    for number in {0, 1, 2} - set(request["descriptors"]):
        os.close(number)
    for number, wanted in zip(high, request["descriptors"], strict=True):
        os.dup2(number, wanted, inheritable=True)
        os.close(number)
    encoding, errors = request["encoding"]
    unbuffered = bool(request["environment"].get("PYTHONUNBUFFERED")) or "-u" in request["original"][1:4]
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = open(number, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            raw,
            encoding=encoding,
            errors=errors if name == "stdout" else "backslashreplace",
            line_buffering=not unbuffered and (os.isatty(number) or name == "stderr"),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if 0 in request["descriptors"]:
        sys.stdin = sys.__stdin__ = open(0, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115


def _run(request: dict[str, Any]) -> None:
    """The program, as the interpreter itself starts it; ends by the interpreter's own ways out."""
    kind, program = request["program"]
    sys.modules["__main__"] = main = ModuleType("__main__")
    safe_path = sys.flags.safe_path
    if kind == "-m":
        if not safe_path:
            sys.path.insert(0, str(Path.cwd()))
        sys.modules.pop(program, None)  # imported by another: as the main module it is made again
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]
        return
    if not safe_path:
        sys.path.insert(0, str(Path(program).resolve().parent))
    main.__dict__.update(__file__=program, __builtins__=__builtins__)
    exec(compile(Path(program).read_bytes(), program, "exec"), main.__dict__)


def _start() -> dict[str, Any]:
    server = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(server.fileno(), False)
    sys.path[:] = [folder for folder in sys.path if folder != OUR_FOLDER]
    _preload(sys.argv[2])
    sys.path.insert(0, OUR_FOLDER)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:  # a fork would have one of them, and locks that the others held
        print(f"fork server: {sys.argv[2]} has {len(threads)} threads: its programs run by themselves", file=sys.stderr)
        os._exit(1)
    return _serve(server)


if __name__ == "__main__":
    asked = _start()
    _become(asked)
    _run(asked)

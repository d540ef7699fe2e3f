"""Hands a program of the tests to the fork server before the interpreter has imported anything; else does nothing.

Python imports this module at its start where a test puts this folder on PYTHONPATH. The process stays the one that others
started and know: it forwards signals to the fork that runs in its place and ends as the fork ends. See `tests/forking/server.py`.
"""

import os
import sys

ADDRESS = "TESTS_FORK_SERVER"
PROGRAMS = ("orchestrator", "orchestrator.worker", "orchestrator.run_state.attempts", "torch.distributed.run")
TORCH_PROGRAMS = (
    "orchestrator.evaluation.compare_with_base",
    "orchestrator.merging.export",
    "orchestrator.metrics.foreground",
    "orchestrator.preflight.main",
)


def _program() -> list[str] | None:
    """What this interpreter was asked to run, where the server can run it: ["-m", module] or ["", script]."""
    place = len(sys.orig_argv) - len(sys.argv)
    if sys.argv[0] == "-m" and sys.orig_argv[place - 1] == "-m":
        module = sys.orig_argv[place]
        return ["-m", module] if module in PROGRAMS + TORCH_PROGRAMS else None
    tests = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    is_ours = sys.argv[0].startswith(tests + os.sep) and sys.argv[0].endswith(".py")
    return ["", sys.argv[0]] if is_ours else None


def _run_elsewhere(program: list[str]) -> None:
    """Returns where the server would not run the same thing: the interpreter then goes on by itself."""
    # the C modules alone: `signal` and `socket` would import enum, selectors and more in every process
    import _signal
    import _socket
    import array
    import marshal

    inherited = [int(name) for name in os.listdir("/proc/self/fd")]
    inherited = [number for number in inherited if _is_inherited(number)]
    settable = _signal.valid_signals() - {_signal.SIGKILL, _signal.SIGSTOP, 32, 33}
    ignored = [number for number in settable if _signal.getsignal(number) == _signal.SIG_IGN]
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "program": program,
        "arguments": sys.argv[1:],
        "original": sys.orig_argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "ignored": [int(number) for number in ignored if number not in {_signal.SIGPIPE, _signal.SIGXFSZ}],
        "blocked": [int(number) for number in _signal.pthread_sigmask(_signal.SIG_BLOCK, [])],
        "descriptors": inherited,
        "path": sys.path,
        "flags": [list(sys.flags)[:-2], sys.warnoptions],
        "safe_path": sys.flags.safe_path,
        "encoding": [sys.stdout.encoding, sys.stdout.errors] if sys.stdout is not None else ["utf-8", "strict"],
    }
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(os.environ[ADDRESS])
        message = marshal.dumps(request)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", inherited))]
        connection.sendmsg([len(message).to_bytes(4, "little")], rights)
        connection.sendall(message)
        begun = connection.recv(4)
    except OSError:  # the server has ended, with the tests
        connection.close()
        return
    if len(begun) == 4:
        _stand_for(int.from_bytes(begun, "little"), connection, settable)
    connection.close()


def _is_inherited(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the descriptor that listed them
        return False


def _stand_for(process: int, connection, settable) -> None:
    """Forwards every signal and ends as the fork ends: with its exit code, or by the signal that killed it."""
    import _signal

    handle = os.pidfd_open(process)

    def forward(number, frame) -> None:
        try:
            _signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass

    for number in settable - {_signal.SIGCHLD, _signal.SIGTSTP, _signal.SIGTTIN, _signal.SIGTTOU, _signal.SIGPIPE}:
        _signal.signal(number, forward)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    for number in (0, 1, 2):  # whoever reads a pipe of the program must see its end when the fork closes it
        os.close(number)
    status = b""
    while len(status) < 4 and (more := connection.recv(4 - len(status))):
        status += more
    status = int.from_bytes(status, "little") if len(status) == 4 else _signal.SIGKILL
    if not os.WIFSIGNALED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    if number != _signal.SIGKILL:
        _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # a signal that does not kill cannot have been the end


if ADDRESS in os.environ and not sys._xoptions and (_found := _program()) is not None:
    _run_elsewhere(_found)

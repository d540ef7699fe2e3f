"""The fork server: starts one zygote for every kind of process that the tests ask for, and passes the requests on.

As a program: `python server.py SOCKET`, which ends when its standard input does. A zygote (`zygote.py`) is an interpreter that
has imported what its programs import, and forks for each request. A request that no zygote can serve exactly (another user,
namespace or limit) is answered by closing the connection: the caller then runs the program itself.
"""

from __future__ import annotations

import array
import json
import marshal
import os
import select
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_DESCRIPTORS = 65
MOST_ZYGOTES = 10
"""Each holds up to 400 MB: kinds that come later run by themselves."""
READ_AT_IMPORT = (
    *(
        "OMP_",
        "GOMP_",
        "KMP_",
        "MKL_",
        "OPENBLAS_",
        "ONEDNN_",
        "DNNL_",
        "ATEN_",
        "TORCH_",
        "PYTORCH_",
        "CUDA_",
        "NVIDIA_",
    ),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DS_", "BNB_", "TRITON_", "HYDRA_", "LD_"),
    *(
        "MALLOC_",
        "GLIBC_",
        "LANG",
        "LC_",
        "HOME",
        "XDG_",
        "PATH",
        "PYTHONPATH",
        "PYTHONHASHSEED",
        "PYTHONWARNINGS",
        "VIRTUAL_ENV",
    ),
)
"""Variables that libraries read while they are imported (prefixes): a zygote serves one set of their values."""
READ_LATER = (
    "HF_TOKEN",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)
RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL",
)
"""Variables of one rank, which no zygote may have in its environment."""
FLAGS = [list(sys.flags)[:-2], sys.warnoptions]
"""Of the interpreter, but for -P and the length of numbers."""
LOGIN = ("orchestrator", "orchestrator.run_state.attempts")


def main() -> None:
    address = sys.argv[1]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    zygotes: dict[str, Zygote] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # the tests have ended: zygotes see the end of their sockets, forks the end of zygotes
            Path(address).unlink(missing_ok=True)
            return
        connection, _ = listener.accept()
        with connection, suppress(Exception):  # whatever it is: the caller runs the program itself
            _pass_on(connection, zygotes)


class Zygote:
    """A process that forks for requests of one kind."""

    def __init__(self, request: dict[str, Any], preload: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        safe = ["-P"] if request["safe_path"] else []
        argv = [
            request["original"][0],
            *safe,
            str(Path(__file__).with_name("zygote.py")),
            str(theirs.fileno()),
            preload,
        ]
        environment = {k: v for k, v in request["environment"].items() if not k.startswith(RANK)}
        for name in ("PYTHONSAFEPATH", "TESTS_FORK_SERVER"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            argv, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.socket = ours

    def send(self, connection: socket.socket, message: bytes, descriptors: list[int]) -> None:
        numbers = array.array("i", [connection.fileno(), *descriptors])
        self.socket.sendmsg([len(message).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        self.socket.sendall(message)


def _pass_on(connection: socket.socket, zygotes: dict[str, Zygote]) -> None:
    message, descriptors = receive(connection)
    try:
        request = marshal.loads(message)
        preload = preload_of(request)
        if request["flags"] != FLAGS or not _is_like_us(connection):
            return
        key = _key(request, preload)
        if key not in zygotes or zygotes[key].process.poll() is not None:
            if len(zygotes) >= MOST_ZYGOTES:
                return
            zygotes[key] = Zygote(request, preload)
        zygotes[key].send(connection, message, descriptors)
    finally:
        for number in descriptors:
            os.close(number)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message of four bytes of length and a body, and the descriptors that came with it. EOFError at the end."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, MOST_DESCRIPTORS)
    while len(head) < 4:
        head += _some(connection, 4 - len(head))
    size, body = int.from_bytes(head, "little"), b""
    while len(body) < size:
        body += _some(connection, size - len(body))
    return body, descriptors


def _some(connection: socket.socket, size: int) -> bytes:
    more = connection.recv(size)
    if not more:
        raise EOFError
    return more


def preload_of(request: dict[str, Any]) -> str:
    """What the program would import, named as in `zygote.PRELOADED`."""
    kind, program = request["program"]
    if kind == "":
        return "whole" if "torch" in Path(program).read_text(encoding="utf-8") else "login"
    if program in LOGIN or program == "torch.distributed.run":
        return "login" if program in LOGIN else "agent"
    files = [word for word in request["arguments"] if word.endswith("run.json")]
    config = json.loads((Path(request["folder"]) / files[0]).read_text(encoding="utf-8"))["config"]
    # the worker alone leaves DeepSpeed out; the other programs import it with Accelerate, as any script does
    has_deepspeed = program != "orchestrator.worker" or config["sharding"]["strategy"] != "none"
    if _needs_bitsandbytes(config):
        return "whole" if has_deepspeed else "quantised"
    return "sharded" if has_deepspeed else "light"


def _needs_bitsandbytes(config: dict[str, Any]) -> bool:
    """As `orchestrator.distributed.import_blocking` decides, from the files alone."""
    base = Path(config["model"]["base"]) / "config.json"
    names = {stage["optimizer"]["name"] for stage in config["stages"].values() if "optimizer" in stage}
    is_quantised = base.is_file() and "quantization_config" in base.read_text(encoding="utf-8")
    return is_quantised or config["quantization"]["scheme"] != "none" or bool(names - {"adamw"})


def _key(request: dict[str, Any], preload: str) -> str:
    environment = sorted(
        (name, value)
        for name, value in request["environment"].items()
        if name.startswith(READ_AT_IMPORT) and not name.startswith(RANK + READ_LATER)
    )
    return repr((preload, request["original"][0], environment, request["path"], request["safe_path"]))


def _is_like_us(connection: socket.socket) -> bool:
    """Whether the caller has our user, limits, cores and namespaces, which its fork would have instead of its own."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return (
        (uid, gid) == (os.getuid(), os.getgid())
        and os.sched_getaffinity(pid) == os.sched_getaffinity(0)
        and _surroundings(str(pid)) == _surroundings("self")
    )


def _surroundings(process: str) -> list[str]:
    folder = Path("/proc") / process
    spaces = [str((folder / "ns" / name).readlink()) for name in ("ipc", "mnt", "net", "pid", "user", "uts")]
    return [*spaces, (folder / "limits").read_text()]


if __name__ == "__main__":
    main()

"""A process that encodes chunks: `python -m orchestrator.data.encoding.worker_process`, pickles in, pickles out.

It ends with its parent: end of input is the end of the work. Only the parent writes to it, over a pipe.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from typing import IO, Any

HEADER = struct.Struct("<Q")


def send(stream: IO[bytes], value: object) -> None:
    """Write one length-prefixed pickle."""
    data = pickle.dumps(value, protocol=5)
    stream.write(HEADER.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next pickle. Raises EOFError if the other side is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    (length,) = HEADER.unpack(header)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def main() -> int:
    """Answer every chunk with its result; the first message is the context."""
    from orchestrator.data.encoding.chunks import ChunkContext, encode_chunk
    from orchestrator.errors import OrchestratorError

    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the pickles
    try:
        context: ChunkContext = receive(incoming)
        while True:
            chunk = receive(incoming)
            try:
                send(outgoing, encode_chunk(chunk, context))
            except OrchestratorError as error:
                send(outgoing, error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return 0


if __name__ == "__main__":
    sys.exit(main())

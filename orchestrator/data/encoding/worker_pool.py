"""Encodes chunks in several processes, in order, with a bounded number in flight; must not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue

from orchestrator.data.encoding.chunks import Chunk, ChunkContext, ChunkResult
from orchestrator.data.encoding.worker_process import receive, send
from orchestrator.errors import OrchestratorError

AHEAD = 4
"""Chunks in flight per process: enough to keep it busy, few enough to bound memory."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_processes(chunks: Iterable[Chunk], context: ChunkContext, *, num_processes: int) -> Iterator[ChunkResult]:
    """The results of the chunks in order. The processes start here and end before this returns.

    They are fresh interpreters (no fork of a process that may hold threads or a device, no second import of its main
    module); one thread per process waits for its results.
    """
    with ExitStack() as stack:
        idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for _ in range(num_processes):
            worker = _start(context)
            stack.callback(_end, worker)
            idle.put(worker)
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=num_processes))
        waiting: deque[Future[ChunkResult]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode, chunk, idle))
                # In order, and bounded: a slow chunk holds the others back instead of filling the memory.
                if len(waiting) >= AHEAD * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start(context: ChunkContext) -> subprocess.Popen[bytes]:
    """A single-threaded worker: processes share the cores, and a tokenizer's threads would only get in the way."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    worker = subprocess.Popen(
        # -P: a module in the working folder must not shadow ours.
        [sys.executable, "-P", "-m", "orchestrator.data.encoding.worker_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert worker.stdin is not None
    with suppress(BrokenPipeError):  # it died at once: reported on first use
        send(worker.stdin, context)
    return worker


def _encode(chunk: Chunk, idle: SimpleQueue[subprocess.Popen[bytes]]) -> ChunkResult:
    worker = idle.get()
    assert worker.stdin is not None and worker.stdout is not None
    try:
        send(worker.stdin, chunk)
        answer = receive(worker.stdout)
    except (EOFError, OSError) as error:
        code = worker.wait(timeout=10)
        raise OrchestratorError(
            f"a process that tokenises ended with code {code} at {chunk.path}, line {chunk.first_number} and following; "
            "where the machine ran out of memory, set num_processes=1"
        ) from error
    finally:
        idle.put(worker)
    if isinstance(answer, OrchestratorError):
        raise answer
    assert isinstance(answer, ChunkResult)
    return answer


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Close the pipes, which ends the process; kill it if it does not end."""
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    try:
        worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()

"""A W&B server on the loopback, for tests: implements what a run needs of the protocol, and records requests.

Modelled because resuming depends on it: a run is created once per id; its history is a list of lines, and a
`file_stream` request writes its lines *at the offset it names*, over existing ones; `RunResumeStatus` returns the
number of lines, the last line and the summary.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"
HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"


@dataclass
class ServerRun:
    """The server's state of one run id."""

    name: str
    files: dict[str, dict[int, str]] = field(default_factory=dict[str, dict[int, str]])
    buckets: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The variables of every UpsertBucket."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    exit_codes: list[int] = field(default_factory=list[int])
    num_preemptions: int = 0
    num_overwritten_lines: int = 0

    def lines(self, file: str) -> list[str]:
        """The lines of a streamed file in order; a gap is an error of the client."""
        content = self.files.get(file, {})
        assert sorted(content) == list(range(len(content))), f"hole in {file}: {sorted(content)}"
        return [content[number] for number in sorted(content)]

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines(HISTORY)]

    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history()]


class WandbServer:
    """A running server: its address, its runs, its requests; `silent` makes it accept requests and never answer."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, ServerRun] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.silent = threading.Event()
        self.closing = threading.Event()

    def run(self, name: str) -> ServerRun:
        """The run of an id, created if new."""
        return self.runs.setdefault(name, ServerRun(name))

    def only_run(self) -> ServerRun:
        """The run, if there is exactly one id."""
        (run,) = self.runs.values()
        return run


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Serve on a free port of the loopback until the block ends."""
    state = WandbServer()

    class Handler(_Handler):
        server_state = state

    with _HttpServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.closing.set()
            http.shutdown()
            thread.join()


@contextmanager
def unreachable(kind: str) -> Iterator[str]:
    """The address of a port that refuses connections, or accepts them and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client killed in the middle of a request is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    """One connection: GraphQL and file streams; everything else is answered with an empty object."""

    server_state: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.server_state.silent.is_set():
            self.server_state.closing.wait()
            return
        with self.server_state.lock:
            answer = self._answer(body)
        self._reply(answer)

    do_PUT = do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Suppress the log line of each request."""

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: bytes) -> dict[str, Any]:
        state = self.server_state
        if self.path == "/graphql":
            request = json.loads(body)
            state.requests.append(request["operationName"])
            return {"data": _graphql(state, request["operationName"], request.get("variables") or {})}
        state.requests.append(self.path)
        if self.path.startswith("/files/") and self.path.endswith("/file_stream"):
            _file_stream(state.run(self.path.split("/")[4]), json.loads(body))
        return {}


def _graphql(state: WandbServer, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The data of one GraphQL answer."""
    if operation == "UpsertBucket":
        return _upsert(state, variables)
    if operation == "RunResumeStatus":
        bucket = _resume_status(state, variables["name"])
        return {"model": {"id": "p", "name": variables["project"], "entity": _entity(), "bucket": bucket}}
    if operation == "CreateRunFiles":
        files = [{"name": name, "uploadUrl": f"{state.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    if operation == "Viewer":
        person = {"id": "v", "entity": "tester", "username": "tester", "email": "", "flags": "{}"}
        return {"viewer": {**person, "teams": {"edges": []}}}
    return {}


def _entity() -> dict[str, str]:
    return {"id": "e", "name": "tester"}


def _upsert(state: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    name = variables["name"]
    inserted = name not in state.runs
    run = state.run(name)
    run.buckets.append(variables)
    if variables.get("config"):
        run.config = json.loads(variables["config"])
    if variables.get("summaryMetrics"):
        run.summary = json.loads(variables["summaryMetrics"])
    bucket = {
        "id": f"id-{name}",
        "name": name,
        "displayName": variables.get("displayName") or name,
        "description": "",
        "config": "{}",
        "sweepName": None,
        "project": {"id": "p", "name": variables.get("project"), "entity": _entity()},
        "historyLineCount": len(run.lines(HISTORY)),
    }
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def _resume_status(state: WandbServer, name: str) -> dict[str, Any] | None:
    if name not in state.runs:
        return None
    run = state.runs[name]
    return {
        "id": f"id-{name}",
        "name": name,
        "displayName": name,
        "tags": [],
        "notes": "",
        "summaryMetrics": json.dumps(run.summary),
        "config": json.dumps(run.config),
        "wandbConfig": '{"t": 1}',
        "historyLineCount": len(run.lines(HISTORY)),
        "historyTail": json.dumps(run.lines(HISTORY)[-1:]),
        "eventsLineCount": len(run.files.get("wandb-events.jsonl", {})),
        "eventsTail": "[]",
        "logLineCount": len(run.files.get("output.log", {})),
    }


def _file_stream(run: ServerRun, request: dict[str, Any]) -> None:
    """Write the lines of one request at their offsets."""
    for name, chunk in (request.get("files") or {}).items():
        target = run.files.setdefault(name, {})
        for number, line in enumerate(chunk["content"], start=chunk["offset"]):
            run.num_overwritten_lines += name == HISTORY and number in target
            target[number] = line
        if name == SUMMARY:
            run.summary = json.loads(chunk["content"][-1])
    run.num_preemptions += bool(request.get("preempting"))
    if request.get("complete"):
        run.exit_codes.append(request.get("exitcode", 0))

"""A hub on this machine: enough of its API for huggingface_hub, and the faults that people meet.

It answers on a port of its own, counts what it sends, and ends with the `with` block; after `MOST`
requests it refuses all further ones, so that a client that tries for ever is seen.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

MOST = 400
COMMIT = "5" * 40
_ROUTE = re.compile(r"/(?:api/models/(?P<api>org/\w+)(?P<what>/\w+)?(?:/.*)?"
                    r"|(?P<repo>org/\w+)/resolve/\w+/(?P<path>.+))")


@dataclass(frozen=True)
class Answer:
    """A status, what is sent, and how: `cut` bytes of the body, then the connection is closed."""

    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


class Request(NamedTuple):
    """`part` is api, tree or file; `name` the file's path; `start` where a range begins."""

    method: str
    part: str
    name: str
    start: int


Fault = Callable[[Request], Answer | None]


@dataclass
class Hub:
    """What one repository holds, `fault` (an answer instead of the true one, or None), and what was
    asked and sent so far."""

    files: dict[str, bytes]
    fault: Fault = lambda _: None
    url: str = ""
    asked: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    def fetched(self) -> set[str]:
        """The files whose bytes were sent."""
        return set(self.sent)

    def answer(self, request: Request) -> Answer:
        self.asked.append(request)
        if len(self.asked) > MOST:
            return Answer(410, b"too many requests for a test")
        made = self.fault(request)
        return made if made is not None else self.true_answer(request)

    def true_answer(self, request: Request) -> Answer:
        if request.part == "api":
            return Answer(body=json.dumps({"id": "org/name", "modelId": "org/name", "sha": COMMIT,
                                           "siblings": [{"rfilename": n} for n in self.files]
                                           }).encode())
        if request.part == "tree":
            return Answer(body=json.dumps([
                {"type": "file", "path": name, "size": len(body), "oid": _tag(body)}
                for name, body in self.files.items()]).encode())
        if request.name not in self.files:
            return Answer(404, b"", headers={"X-Error-Code": "EntryNotFound"})
        body = self.files[request.name]
        headers = {"ETag": f'"{_tag(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not request.start:
            return Answer(200, body, "application/octet-stream", headers)
        return Answer(206, body[request.start:], "application/octet-stream", {
            **headers, "Content-Range": f"bytes {request.start}-{len(body) - 1}/{len(body)}"})


def _tag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = _ROUTE.fullmatch(unquote(urlsplit(self.path).path))
            if not found:
                return self.reply(Answer(404), "")
            part = "file" if found["repo"] else "tree" if found["what"] == "/tree" else "api"
            start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            self.reply(hub.answer(Request(self.command, part, found["path"] or "", start)),
                       found["path"] or "")

        do_HEAD = do_GET

        def do_CONNECT(self) -> None:  # as a proxy that wants a login
            self.reply(Answer(407, b"", headers={"Proxy-Authenticate": "Basic"}), "")

        def reply(self, answer: Answer, name: str) -> None:
            self.send_response(answer.status)
            for key, value in {"Content-Type": answer.kind, "Content-Length": len(answer.body),
                               "Connection": "close", **answer.headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.close_connection = True
            if self.command == "GET":
                body = answer.body[:answer.cut]
                self.wfile.write(body)
                if name and answer.status < 300:
                    hub.sent[name] = hub.sent.get(name, 0) + len(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer for `hub` on a free port of this machine until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}

"""A server that works is waited for, however long it takes; one that stands still is given up."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bipdeploy.errors import StageError
from bipdeploy.serving import engine as engines
from bipdeploy.serving import server
from bipdeploy.serving.server import Server, free_port

# Works in one of two ways for longer than a server may stand still, then answers.
SLOW = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
began = time.monotonic()
while time.monotonic() - began < 4:
    if sys.argv[2] == "says":
        print("loading", flush=True); time.sleep(0.2)
print("serving", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


@pytest.fixture
def starts(monkeypatch):
    """A server that runs a script instead of vLLM, and may stand still for a second."""
    monkeypatch.setattr(server, "STILL_SECONDS", 1)

    def made(script: str, *arguments: str) -> Server:
        port = free_port()
        monkeypatch.setattr(engines, "command", lambda *_: [sys.executable, "-c", script, str(port),
                                                            *arguments])
        return Server(Path("model"), dict(os.environ), "127.0.0.1", port, [])

    return made


@pytest.mark.slow
@pytest.mark.parametrize("way", ["says", "computes"])
def test_a_server_that_works_is_waited_for(starts, way):
    with starts(SLOW, way) as slow:
        slow.wait_healthy()
        assert slow.startup_seconds > server.STILL_SECONDS


@pytest.mark.slow
def test_a_server_that_stands_still_is_given_up_and_stopped(starts):
    with starts("import time; print('stuck', flush=True); time.sleep(600)") as still:
        with pytest.raises(StageError, match=r"has done nothing for 1 s .* stuck"):
            still.wait_healthy()
        assert still.running()
    assert not still.running()


@pytest.mark.slow
def test_a_server_that_ends_is_not_waited_for(starts):
    with starts("import sys; sys.exit('no memory')") as ended:
        time.sleep(0.1)
        with pytest.raises(StageError, match=r"vLLM ended while starting: .*no memory"):
            ended.wait_healthy()

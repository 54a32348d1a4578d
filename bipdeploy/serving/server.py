"""vLLM's OpenAI-compatible server as a child process: started, waited for, asked, stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError, StageError
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import Architecture
from bipdeploy.model.formats import misread
from bipdeploy.pruning import divisibility
from bipdeploy.serving import engine as engines
from bipdeploy.serving.engine import Engine

STILL_SECONDS = 300  # without a line, computing or reading: then a server will not start any more
STOP_SECONDS = 30


def checked(folder: Path, engine: Engine, tensor_parallel: int = 1) -> Architecture:
    """The sizes of a checkpoint that `engine` can serve. Raises InputError that says why not.

    Every shard is opened: one that is missing or cut off is named here and not by vLLM, minutes
    later.
    """
    checkpoint = Checkpoint(folder)
    arch = checkpoint.architecture
    checkpoint.verify()
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(f"{folder} has no tokenizer.json; copy it from the dense model")
    engine.refuse(arch)
    if misread(checkpoint.config, arch):
        raise InputError(f"{folder}: vLLM's own Qwen2 cannot have this head size ({arch.head_dim} "
                         f"with {arch.blocks[0].heads} heads); set export.vllm.enabled: true and "
                         "serve what that writes")
    if tensor_parallel > 1:
        faults = divisibility.faults(arch.blocks, tensor_parallel)
        if faults:
            raise InputError(f"tensor parallel size {tensor_parallel} does not divide this model: "
                             f"{faults[0]}; prune with hardware.tensor_parallel: {tensor_parallel}")
    return arch


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raise InputError where something listens on a port already, or the address is not ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port {port} on {host} cannot be used ({error.strerror}); give "
                             "another with --port, or --port 0 for any free one") from error


class Server:
    """`vllm serve FOLDER` in its own process group. A context manager: leaving it stops it.

    `variables` come from `engine.environment`, which must stay open as long as the server.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str], host: str, port: int,
                 options: list[str]):
        self.folder, self.variables, self.host, self.port = folder, variables, host, port
        self.arguments = ["serve", str(folder), "--host", host, "--port", str(port), *options]
        self.startup_seconds = float("nan")
        self.show = False  # whether the server's lines go to stderr from now on
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=400)
        self._count = 0  # of all lines

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            engines.command(*self.arguments), env=dict(self.variables), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True)  # Ctrl-C reaches us alone, and we stop it in order
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _read(self) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            self._lines.append(line)
            self._count += 1
            if self.show:
                sys.stderr.write(line)

    def wait_healthy(self, tick: Callable[[], None] = lambda: None) -> None:
        """Return once the server answers, however long it works on that. Raises StageError where
        it ends, or stands still."""
        began = moved = time.monotonic()
        before = self._work()
        while True:
            if not self.running():
                raise StageError(f"vLLM ended while starting: {engines.cause(self.output())}")
            with suppress(OSError):  # not listening yet (URLError is one too)
                self.get("/health", timeout=5)
                self.startup_seconds = time.monotonic() - began
                return
            if (now := self._work()) != before:
                before, moved = now, time.monotonic()
            if time.monotonic() - moved > STILL_SECONDS:
                raise StageError(f"vLLM has done nothing for {STILL_SECONDS} s and is not ready; "
                                 f"its last line: {engines.cause(self.output())}")
            tick()
            time.sleep(0.25)

    def _work(self) -> tuple[int, int]:
        """What changes while the server and its children work: lines, and CPU seconds in all. A
        process that only waits takes some as well, less than one in ten."""
        import psutil

        spent = 0.0
        with suppress(psutil.Error):
            main = psutil.Process(self.pid)
            for process in (main, *main.children(recursive=True)):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    spent += times.user + times.system
        return self._count, int(spent // (STILL_SECONDS / 10))

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def output(self) -> str:
        """The last lines that the server printed."""
        if not self.running():
            self._reader.join(timeout=5)
        return "".join(self._lines)

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status."""
        assert self._process
        return self._process.wait()

    def get(self, path: str, timeout: float = 30) -> str:
        """The body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return answer.read().decode("utf-8", "replace")

    def cache_tokens(self) -> int:
        """How many tokens the KV cache holds, as the server's metrics state it."""
        return cache_tokens(self.get("/metrics"))

    def stop(self) -> None:
        """End the server and what it started: politely first, then by force."""
        if self._process is None:
            return
        self.show = False  # what it says while ending (leak reports, tracebacks) helps nobody
        if self.running():
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # engine processes that were left behind
        self._process.wait()
        self._reader.join(timeout=5)


def cache_tokens(metrics: str) -> int:
    """KV-cache capacity in tokens from Prometheus text. Raises StageError where it is not there.

    vLLM states it as a label; older versions state blocks and their size.
    """
    line = next((line for line in metrics.splitlines()
                 if line.startswith("vllm:cache_config_info{")), "")
    labels: dict[str, Any] = dict(re.findall(r'(\w+)="([^"]*)"', line))
    for numbers in (("kv_cache_size_tokens",), ("num_gpu_blocks", "block_size")):
        values = [labels.get(name, "") for name in numbers]
        if all(value.isdigit() for value in values):
            product = 1
            for value in values:
                product *= int(value)
            return product
    raise StageError("vLLM's metrics do not state the size of its KV cache "
                     "(vllm:cache_config_info)")

"""What `bipdeploy serve` does: find the checkpoint, start vLLM for it, wait, say where it is."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bipdeploy.cli.console import out, starting
from bipdeploy.errors import InputError, StageError
from bipdeploy.model import sources
from bipdeploy.running import artifacts
from bipdeploy.serving import engine as engines
from bipdeploy.serving import server
from bipdeploy.serving.server import Server

EXPORTS = ("export/vllm", "export/transformers")  # of a run, the first that is there
CPU_CACHE_GIB = 4


@dataclass(frozen=True)
class Target:
    """What is to be served: a folder, the name clients use, and over how many GPUs it was meant
    to be split."""

    folder: Path
    name: str
    tensor_parallel: int = 1


def find_target(path: str) -> Target:
    """The checkpoint behind a run's folder, an export's, a model folder or id. Raises
    InputError where there is none."""
    folder = Path(path).expanduser()
    manifest = artifacts.read_run(folder)
    if manifest:
        found = next((folder / e for e in EXPORTS if (folder / e / "config.json").is_file()), None)
        if found is None:
            raise InputError(f"{folder} has no exported model yet; finish it with `bipdeploy run`")
        recipe = manifest["recipe"]
        return Target(found, recipe["name"], recipe.get("hardware", {}).get("tensor_parallel", 1))
    for place in ("vllm", "transformers"):
        if (folder / place / "config.json").is_file():
            return Target(folder / place, folder.resolve().name)
    found = sources.model_folder(path)
    return Target(found, path if path.startswith("builtin:") else found.resolve().name)


def serve(path: str, host: str, port: int, extra: Sequence[str], verbose: bool) -> None:
    """Serve until Ctrl-C or SIGTERM. `extra`: flags for `vllm serve`, passed through as they are.

    Raises InputError for what cannot work, StageError where the server ends by itself.
    """
    engine = engines.find()
    target = find_target(path)
    given = _value(extra, "--tensor-parallel-size", "-tp")
    split = _whole(given) if given else min(target.tensor_parallel, engine.devices)
    server.checked(target.folder, engine, split)
    if port:
        server.require_free(host, port)
    options: dict[str, Any] = {"served_model_name": target.name}
    if split > 1 and not given:
        options["tensor_parallel_size"] = split
    if engine.device == "cpu" and not _mentions(extra, "--enforce-eager", "--no-enforce-eager",
                                                "--compilation-config", "-O", "-cc"):
        options["enforce_eager"] = True  # compiling for a CPU takes minutes
    name = _value(extra, "--served-model-name") or target.name
    with engines.environment(engine, CPU_CACHE_GIB) as variables, _stopping_in_order():
        running = Server(target.folder, variables, host, port or server.free_port(host),
                         [*engines.flags(options), *extra])
        running.show = verbose
        with suppress(KeyboardInterrupt), running:
            with starting(f"starting {engine} for {target.folder}"):
                running.wait_healthy()
            out.print(f"ready after {running.startup_seconds:.0f} s: {running.url}/v1 "
                      f"serves {name}", markup=False)
            out.print(_curl(running.url, name), markup=False)
            out.print("Ctrl-C stops it", markup=False)
            running.show = True
            status = running.wait()
            raise StageError(f"vLLM ended with status {status}: {engines.cause(running.output())}")


def _curl(url: str, name: str) -> str:
    body = f'{{"model": "{name}", "prompt": "The list of", "max_tokens": 32}}'
    return (f"curl {url}/v1/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(body)}")


def _value(words: Sequence[str], *names: str) -> str | None:
    """The value of a flag among words, written `--flag value` or `--flag=value`."""
    for at, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in names:
            return value if equals else next(iter(words[at + 1:]), "")
    return None


def _whole(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise InputError(f"--tensor-parallel-size: {text!r} is not a positive whole number")
    return int(text)


def _mentions(words: Sequence[str], *names: str) -> bool:
    return any(word.partition("=")[0] in names for word in words)


class _stopping_in_order:
    """SIGINT, and SIGTERM, which `docker stop` and supervisors send, end the server in order; also
    where SIGINT is ignored from the start, as for what a script puts into the background."""

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._interrupt)
                        for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

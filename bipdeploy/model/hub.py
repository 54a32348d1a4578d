"""A model's files from the hub: those that are read and no others, and a line for what went wrong.

Imports no heavy library. huggingface_hub keeps the files in its cache and goes on where one broke
off; what it gives up on and may yet pass is tried again here.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import COMPANIONS, INDEX, SINGLE
from bipdeploy.running.artifacts import disk_full

_WAITS = (1, 2, 4)  # seconds before another try
_PATIENCE = 60  # the longest that a host may ask for, in seconds
_PASSING = {408, 429, 500, 502, 503, 504}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_SHORT = "Consistency check failed"  # the hub's client, of a file's size
_NEVER_PAGES = {".json", ".safetensors", ".model", ".tiktoken"}
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
               errno.ENOTDIR, errno.EEXIST)

_FIXES = {
    401: "log in with `hf auth login`",
    403: "check HF_ENDPOINT and the proxy or firewall in between, or log in with `hf auth login`",
    404: "check the id, and HF_ENDPOINT",
    407: "set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT for the proxy",
    429: "wait and run again; `hf auth login` raises the limit",
}
_PROXY = "check HF_ENDPOINT and the proxy in between"


def fetch(model: str, revision: str | None = None, *, code: bool = False,
          weights: bool = True) -> Path:
    """The folder in the hub's cache that holds a model; what is missing there is downloaded.

    That is the config, the weights that are read (the shards that the index names, or the one
    file), the tokenizer and its companions, and licences; with `code` the Python files too, without
    `weights` only `config.json`. Where the hub cannot be reached, what the cache has is taken.
    Raises InputError with one line that says who answered what, and what to do.
    """
    from huggingface_hub import constants

    if not weights:
        return _snapshot(model, revision, allow_patterns=["config.json"])
    folder = _snapshot(model, revision, allow_patterns=["config.json", INDEX, *COMPANIONS,
                                                        *(["*.py"] if code else [])],
                       ignore_patterns=[f"*/{p}" for p in COMPANIONS if p.startswith("*.")])
    files = _weight_files(folder)
    if not (all((folder / name).is_file() for name in files) or constants.HF_HUB_OFFLINE):
        commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
        _snapshot(model, commit, allow_patterns=files)
    if not any((folder / name).is_file() for name in files):
        raise InputError(f"model.id: {model} has no safetensors here: its repository has none, or "
                         "only its config.json is in the hub cache and the hub cannot be reached; "
                         "go online once, or give a folder that holds them")
    return folder


def _weight_files(folder: Path) -> list[str]:
    """The names of the files of weights that `Checkpoint` reads."""
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted(set(map(str, named)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is damaged ({type(error).__name__}: {error}); remove it, and it "
                         "is fetched again") from error


def _snapshot(model: str, revision: str | None, **patterns: Any) -> Path:
    from huggingface_hub import snapshot_download

    waits = list(_WAITS)
    while True:
        try:
            with _quiet():
                folder = Path(snapshot_download(model, revision=revision, **patterns))
        except Exception as error:  # the hub's client raises many kinds
            cached = getattr(error, "snapshot_path", None)  # of a snapshot that lacks some of it
            if cached and _unreachable(error) and Path(cached, "config.json").is_file():
                return Path(cached)
            wait = _wait(error, waits)
            if wait is None:
                raise InputError(_line(model, revision, error, len(_WAITS) - len(waits))) from error
            time.sleep(wait)
        else:
            _refuse_web_pages(model, folder)
            return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's library from saying in many lines what is said here in one. A user who set
    HF_HUB_VERBOSITY hears all of it."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    if before == logging.WARNING:
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too little space, before that is an error
            yield
    finally:
        logging.set_verbosity(before)


def _refuse_web_pages(model: str, folder: Path) -> None:
    """Refuse a file that is the page of a proxy or a login, and take it out of the cache: it would
    be found there for ever."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in _NEVER_PAGES and p.is_file()):
        with path.open("rb") as file:
            page = _WEB_PAGE.match(file.read(512))
        if page:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise InputError(f"model.id: {_host()} gave a web page for {model}'s {path.name}; sign "
                             f"in where a browser asks you to, or {_PROXY}")


# What went wrong

def _wait(error: BaseException, waits: list[int]) -> int | None:
    """Seconds until another try, which leave `waits`; None where no other is left or would help."""
    response = _response(error)
    passing = response.status_code in _PASSING if response is not None else _broken(error)
    asked = _retry_after(response) if passing and response is not None else 0
    if not passing or not waits or asked > _PATIENCE:
        return None
    return max(waits.pop(0), asked)


def _line(model: str, revision: str | None, error: BaseException, again: int) -> str:
    """One line for what the hub's client raised in the end, after trying `again` times more."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (f"model.id: {model} asks for its licence to be accepted on the hub; do that, then "
                "log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"model.revision: {model} has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"model.id: the hub has no model {model}, or it is private; check the id or log in "
                "with `hf auth login`")
    if isinstance(error, errors.HFValidationError):
        return f"model.id: {model!r} is neither a folder nor a hub id: {_words(error)}"
    full = cache_fault(error, str(constants.HF_HUB_CACHE))
    if full:
        return full
    response = _response(error)
    tried = f" ({again + 1} times)" if again else ""
    if response is not None:
        return (f"model.id: {model} could not be had: {_host()} answers{tried} "
                f"{_answer(response, error)}; {_fix(response)}")
    if isinstance(error, _http().ProxyError):
        return (f"model.id: {model} could not be had: the proxy answers {_words(error)}; check "
                "HTTPS_PROXY and NO_PROXY")
    if _unreachable(error):
        why = next((f" ({_words(e)})" for e in _chain(error)
                    if isinstance(e, _http().HTTPError)), "")
        return (f"model.id: {model} is neither a local folder nor in the hub cache, and the hub "
                f"cannot be reached{why}; use a local folder or builtin:pico")
    if _SHORT in str(error):
        return (f"model.id: {model} could not be had: {_host()} sent a file of another size than "
                f"it said{tried} ({_words(error)}); run again, or {_PROXY}")
    if _broken(error):
        return (f"model.id: {model} could not be had whole: the connection to {_host()} broke off"
                f"{tried}: {_words(error)}; run again, files that are whole are kept")
    return (f"model.id: {model} could not be had: {_host()} does not answer as a hub does "
            f"({type(error).__name__}: {_words(error)}); sign in where a browser asks you to, or "
            f"{_PROXY}")


def cache_fault(error: BaseException, folder: str, name: str = "HF_HUB_CACHE") -> str | None:
    """The line for a cache folder that cannot be written; None where that is not what `error` says.

    `name`: the environment variable that moves this folder; HF_HOME moves all of them.
    """
    causes = list(_chain(error))
    said = [os.strerror(n) for n in _UNWRITABLE for e in causes
            if n == getattr(e, "errno", None) or os.strerror(n) in str(e)]
    if not said or any(isinstance(e, _http().HTTPError) for e in causes):
        return None
    fix = ("free some space there, or set it (or HF_HOME) to a folder on a larger disk"
           if any(map(disk_full, causes)) else
           "make it writable, or set it (or HF_HOME) to a folder that is")
    return f"{name}: the cache {folder} cannot be written ({said[0]}); {fix}"


def _answer(response: Any, error: BaseException) -> str:
    """Status, and what the host itself says about it: the hub's message, or the title of a page."""
    status = response.status_code
    said = next(filter(None, (getattr(e, "server_message", "") for e in _chain(error))), "")
    if not said:
        title = re.search(r"<(title|h1)[^>]*>(.*?)</\1>", _body(response), re.I | re.S)
        said = title[2] if title else ""
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    asked = _retry_after(response)
    return " ".join(filter(None, [
        f"{status} {phrase}".strip(), f"({_short(said)})" if said else "",
        f"and asks to wait {asked} s" if asked else ""]))


def _body(response: Any) -> str:
    try:
        return str(response.text)
    except Exception:  # of an answer that was streamed, and is closed by now
        return ""


def _fix(response: Any) -> str:
    status = response.status_code
    later = "run again later, or give a local folder" if status >= 500 else _PROXY
    return _FIXES.get(status, later)


def _retry_after(response: Any) -> int:
    """Seconds that an answer asks to wait, by a number or a date; 0 where it asks for nothing."""
    value = str(response.headers.get("Retry-After", "")).strip()
    if value.isdigit():
        return int(value)
    try:
        return max(0, round(parsedate_to_datetime(value).timestamp() - time.time()))
    except (ValueError, TypeError):
        return 0


def _response(error: BaseException) -> Any:
    """The answer with an error's status, where there was an answer."""
    answers = (getattr(e, "response", None) for e in _chain(error))
    return next((answer for answer in answers if answer is not None), None)


def _unreachable(error: BaseException) -> bool:
    """Whether no connection came about, or none was to be made."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    http = _http()
    kinds = (OfflineModeIsEnabled, http.ConnectError, http.ConnectTimeout)
    return any(isinstance(e, kinds) for e in _chain(error))


def _broken(error: BaseException) -> bool:
    """Whether a connection broke off, or a file came short. hf_xet, which large files come by,
    raises built-in kinds."""
    http = _http()
    kinds = (http.TransportError, RuntimeError, ConnectionError, TimeoutError)
    return (not _unreachable(error) and not isinstance(error, http.ProxyError)
            and (any(isinstance(e, kinds) for e in _chain(error)) or _SHORT in str(error)))


def _http() -> Any:
    """The HTTP library that huggingface_hub uses: httpx, or a later one of the same shape."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]
    return importlib.import_module(base.__module__.partition(".")[0])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


def _words(error: BaseException) -> str:
    return _short(str(error) or type(error).__name__)


def _short(text: str) -> str:
    """Some words of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:159]}…"

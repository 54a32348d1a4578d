"""What is made once and kept in the user's cache, whoever comes first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bipdeploy.errors import InputError
from bipdeploy.running import artifacts


def home() -> Path:
    """`$XDG_CACHE_HOME/bipdeploy`, or `~/.cache/bipdeploy`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bipdeploy"


def made(kind: str, key: str, source: Path, make: Callable[[Path], None]) -> Path:
    """The folder `kind/key` of the cache, made of `source`: as it is there, or as `make` writes it
    now, whole or not at all. Others that want it meanwhile wait. Raises InputError where the cache
    cannot be written.
    """
    from filelock import FileLock

    place = home() / kind / key
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(place.with_name(f".{key}.lock")).acquire()
    except OSError as error:
        raise InputError(f"cannot write to {place.parent} ({error.strerror}), where {source} is to "
                         "be written out; set XDG_CACHE_HOME to another folder") from error
    with held:
        if not place.is_dir():
            with artifacts.writing(place) as partial:
                make(partial)
    return place

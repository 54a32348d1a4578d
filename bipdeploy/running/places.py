"""Where results may be written: nowhere that something else would be lost, and by one at a time."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bipdeploy.errors import InputError
from bipdeploy.running import artifacts

if TYPE_CHECKING:
    from filelock import BaseFileLock

# What file managers and Python leave in folders by themselves, beside what is hidden.
_LITTER = {"Thumbs.db", "desktop.ini", "__pycache__"}


def require_place(out: Path, stage: str, inputs: Iterable[Path], *, force: bool = False,
                  option: str = "--out", known: Iterable[str] = ()) -> str | None:
    """Refuse a folder whose replacement by what `stage` writes would lose something.

    It may be new, empty, or what the same stage wrote before: files that its manifest names, or
    that are `known`. With `force` it may be anything that is neither read nor where somebody
    lives. Returns what `force` removes, in words. Raises InputError that names `option`.
    """
    other = f"give another folder with {option}"
    real = out.resolve()
    homes = [("the folder you are in", Path.cwd())]
    with suppress(RuntimeError):  # nobody's, as in some containers
        homes.append(("your home folder", Path.home()))
    for what, place in homes:
        if place.resolve().is_relative_to(real):
            raise InputError(f"{option}: {out} is, or holds, {what}; {other}")
    require_apart(real, inputs, option)
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"cannot write to {out}: it is a file; {other}")
    found = sorted(p for p in out.rglob("*") if not any(
        part in _LITTER or part.startswith(".") for part in p.relative_to(out).parts))
    if not found:
        return None
    why = _foreign(out, stage, found, set(known))
    if why and not force:
        hint = ", or --force to replace it" if option == "--out" else ", or remove it"
        raise InputError(f"cannot write to {out}: {why}; {other}{hint}")
    if why:
        size = sum(p.stat().st_size for p in found if p.is_file())
        return f"--force removes {out}: {len(found)} files and folders, {size:,} bytes"
    return None


def _foreign(out: Path, stage: str, found: list[Path], known: set[str]) -> str | None:
    """Why a folder is not simply what a stage wrote before; None where it is."""
    manifest = artifacts.read_manifest(out) or {}
    if "stage" not in manifest and not known:
        return f"it holds {found[0].relative_to(out)} and was not written by bipdeploy"
    if manifest.get("stage", stage) != stage:
        return f"it is what the stage {manifest['stage']} wrote"
    known |= {artifacts.MANIFEST, *manifest.get("sizes", {})}
    extra = [p for p in found if not p.is_dir() and p.relative_to(out).as_posix() not in known]
    return f"it holds {extra[0].relative_to(out)}, which bipdeploy did not write" if extra else None


def require_apart(out: Path, inputs: Iterable[Path], option: str = "--out", *,
                  holding: bool = True) -> None:
    """Refuse a folder that is one that is read, lies in one or, where all of it is replaced, holds
    one (`holding`). Raises InputError."""
    real = out.resolve()
    for path in inputs:
        read = path.expanduser().resolve()
        where = ("is" if real == read else "lies in" if real.is_relative_to(read)
                 else "holds" if holding and read.is_relative_to(real) else None)
        if where:
            raise InputError(f"{option}: {out} {where} {path}, which is read; give another folder")


@contextmanager
def alone(folder: Path, option: str = "--out", *, inside: bool = False) -> Iterator[None]:
    """Hold a folder's lock, in a file that goes with it: beside the folder or, where it is never
    replaced as a whole, `inside`. The lock of a process that died is free. Raises InputError that
    names the process that holds it.
    """
    from filelock import Timeout

    path = folder / ".lock" if inside else folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(path)
    except Timeout as error:
        raise InputError(f"{folder} is being written by {_owner(path)}; wait until that has ended, "
                         f"or give another folder with {option}") from error
    except OSError as error:
        raise artifacts.unwritable(folder, error) from error
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(),
                                    "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened it meanwhile sees that it is gone
        lock.release()


def _acquired(path: Path) -> BaseFileLock:
    """A lock on the file that lies at `path` now, not on one that its holder has just removed."""
    from filelock import FileLock

    while True:
        with suppress(FileNotFoundError):  # its holder has just removed it: again
            path.touch()
            before = path.stat().st_ino
            lock = FileLock(path, timeout=0)
            lock.acquire()
            # While it was open its number could not be another file's.
            with suppress(OSError):
                if path.stat().st_ino == before:
                    return lock
            lock.release()


def _owner(path: Path) -> str:
    for _ in range(20):  # it may have begun just now, and not have said who it is
        try:
            said = json.loads(path.read_text())
            return f"process {said['pid']} on {said['host']} since {said['since']}"
        except (OSError, ValueError, KeyError):
            time.sleep(0.1)
    return "another process"

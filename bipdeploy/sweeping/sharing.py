"""What trials share: stage folders that would be the same, and the quiet that a bench needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bipdeploy.pipeline.keys import intact
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Silent


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock, alone or with others that share it, that is gone when the process is."""
    import fcntl  # POSIX alone has it, and plans are made elsewhere too

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise artifacts.unwritable(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def once(name: str, key: str, folder: Path) -> Iterator[None]:
    """Within this block no other trial runs the same stage with the same key. Where one did
    before, its folder is in `folder` as well: linked, so it takes no space of its own."""
    with locked(folder.parent / ".locks" / f"{name}-{key[:16]}"):
        if not intact(folder / name, key):
            _take(name, key, folder)
        yield


def _take(name: str, key: str, folder: Path) -> None:
    for other in sorted(folder.parent.glob(f"*/{name}")):
        if intact(other, key):
            with suppress(FileNotFoundError, shutil.Error):  # it is being replaced just now
                folder.mkdir(parents=True, exist_ok=True)
                with artifacts.writing(folder / name) as partial:
                    # Stages are replaced as whole folders and never changed in place.
                    shutil.copytree(other, partial, copy_function=artifacts.link_or_copy,
                                    dirs_exist_ok=True)
                return


@contextmanager
def turn(stage: str) -> Iterator[Silent]:
    """A trial's stage on this machine: what is timed waits until it is the only one, and others
    wait for it. Holds for all sweeps of one user; other programs are not kept away."""
    lock = Path(tempfile.gettempdir()) / f"bipdeploy-{os.getuid()}.lock"
    with locked(lock, shared=stage not in ("bench", "profile")):
        yield Silent()

"""Records on disk: one line of JSON each, appended so that a killed run loses none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bipdeploy.running import artifacts

RECORDS = "records.jsonl"
_WORK = ".work-"


def read(folder: Path) -> list[dict[str, Any]]:
    """All whole records; a line that a kill cut off is passed over."""
    try:
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record: on the disk when this returns. Several processes may do so at once."""
    import fcntl  # POSIX alone has it, and plans are made elsewhere too

    line = json.dumps(record) + "\n"
    try:
        with (folder / RECORDS).open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a kill cut the line before it off
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise artifacts.unwritable(folder / RECORDS, error) from error


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A temporary folder within `folder`, which must be there."""
    import fcntl

    try:
        work = Path(tempfile.mkdtemp(dir=folder, prefix=_WORK))
        lock = (work / "new").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        (work / "new").rename(work / "lock")  # held before `sweep` can see it
    except OSError as error:
        raise artifacts.unwritable(folder, error) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()


def sweep(folder: Path) -> None:
    """Remove the work folders that killed processes left behind: nobody holds their locks."""
    import fcntl

    for lock in folder.glob(f"{_WORK}*/lock"):
        with suppress(OSError), lock.open() as file:  # in use, or removed just now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)

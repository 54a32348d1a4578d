"""Stage folders on disk: written whole or not at all, each with a manifest of how it was made."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bipdeploy.errors import BipdeployError, InputError, StageError

MANIFEST = "manifest.json"
FIGURES = "figures.json"


@contextmanager
def writing(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes if not.

    What stood at `final` stays until then. Raises InputError where the place cannot be written,
    StageError where the disk is full.
    """
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    _restore(old, final)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise unwritable(final.parent, error) from error
    try:
        yield partial
        _swap(partial, final, old)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise unwritable(final, error) from error
        raise
    finally:
        _restore(old, final)
        _remove(old)


def _restore(old: Path, final: Path) -> None:
    """Put back what stood at `final`, where a process was stopped between the two renames, or while
    contents were exchanged."""
    if _filling(final).exists():
        _fill(final, old)
        _filling(final).unlink()
    elif old.is_dir() and not final.exists():
        old.rename(final)


def _swap(partial: Path, final: Path, old: Path) -> None:
    """Put `partial` in the place of `final`; what stood there goes to `old`.

    A folder that cannot be renamed (in a lower layer of an overlay file system, or a mount point)
    stays, and its contents are exchanged: they are copied to `old` first.
    """
    _remove(old)
    try:
        if final.exists() or final.is_symlink():
            final.rename(old)
        partial.rename(final)
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES):
            raise
        if not final.is_dir():
            raise
    shutil.copytree(final, old, symlinks=True)
    _filling(final).touch()
    try:
        _fill(final, partial)
    except BaseException:
        _fill(final, old)
        raise
    finally:
        _filling(final).unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _filling(final: Path) -> Path:
    """The file that is there while a folder's contents are exchanged."""
    return final.with_name(f".{final.name}.filling")


def _fill(folder: Path, source: Path) -> None:
    """Give a folder the contents of another, which loses them, instead of its own."""
    for path in list(folder.iterdir()):
        _remove(path)
    for path in list(source.iterdir()):
        shutil.move(path, folder / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """A file in a second place: linked where the file system allows it, else copied. Of a symbolic
    link, as a hub's cache has them, the file that it stands for."""
    real = Path(source).resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def checkpoint_folder(folder: Path) -> Path:
    """Where a stage that writes `folder` (final, or the partial one that `writing` gives) keeps
    what an interrupted run can go on from. Removed once the stage has ended well."""
    name = folder.name
    if name.startswith(".") and name.endswith(".partial"):
        name = name[1:].removesuffix(".partial")
    return folder.with_name(f".{name}.checkpoint")


def unwritable(path: Path, error: BaseException) -> BipdeployError:
    """What to raise where something cannot be written: a full disk is no fault of the input."""
    if disk_full(error):
        return StageError(f"the disk is full while writing {path}; free some space and run again, "
                          "earlier stages are kept")
    return InputError(f"cannot write to {path}: {getattr(error, 'strerror', None) or error}; give "
                      "another folder with --runs or --out")


def disk_full(error: BaseException) -> bool:
    """safetensors reports a full disk in words, Python by number."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=2, sort_keys=False, default=str) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage wrote. Raises InputError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}; run the stage that writes it first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}; run its stage again with --from") from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A stage folder's manifest, or None where there is none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def require_key(folder: Path, key: str) -> None:
    """Raise StageError where a stage's folder is not the one that was made under a key."""
    found = (read_manifest(folder) or {}).get("key")
    if found != key:
        raise StageError(f"{folder} was replaced meanwhile, and is not what this run made; run it "
                         "again, in a folder of its own")


def read_run(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole run, or None where the folder is none."""
    manifest = read_manifest(folder)
    return manifest if manifest and "recipe" in manifest else None


def figures(folders: list[Path]) -> dict[str, float]:
    """All figures of several stage folders together."""
    merged: dict[str, float] = {}
    for folder in folders:
        if (folder / FIGURES).is_file():
            merged |= read_json(folder / FIGURES)
    return merged


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(data: Any) -> str:
    """SHA-256 of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()

"""Local files of text: exactly the file that is named, as text or as columns, or refused."""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

# Longer ones first: UTF-32's begins with that of UTF-16.
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
          codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_OTHER_FILES = {b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive or an office document",
                b"%PDF": "a PDF document", b"PAR1": "a parquet file"}


@dataclass(frozen=True)
class Table:
    """A file's rows by column: `column` gives a column's values, None where a row has none."""

    names: list[str]
    column: Callable[[str], Iterable[Any]]


def located(name: str) -> Path:
    """The path that a name stands for, `~` expanded where that can be."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # a home that there is not
        return Path(name)


def fault(path: Path) -> str | None:
    """Why a file cannot be read, without reading it; None where it can."""
    try:
        if path.is_dir():
            return f"{str(path)!r} is a folder; give one file"
        if not path.exists():
            return f"there is no file {str(path)!r}"
        if not path.is_file():  # opening a pipe would wait
            return f"{str(path)!r} is no regular file; copy what it gives into one"
        with path.open("rb") as file:
            return None if file.read(1) else f"{str(path)!r} is empty"
    except (OSError, ValueError) as error:
        return f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"


def running(path: Path, field: str) -> str:
    """The text of a .txt file, lines ended by \\n. `field` is the recipe's that names it, for
    messages. Raises InputError with one line where it is not UTF-8 text."""
    content, reason = _decoded(path)
    if reason:
        raise InputError(f"{field}: {path} is not readable UTF-8 text: {reason}")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def table(path: Path, field: str) -> Table:
    """The columns of a .jsonl, .json or .parquet file. Raises InputError with one line where it is
    not such a file; so may the columns that are read later."""
    kind = path.suffix[1:].lower()
    try:
        return _parquet(path, field) if kind == "parquet" else _json(path, kind)
    except _Damaged as error:
        raise InputError(f"{field}: {path} is not readable as {kind}: {error}") from error


class _Damaged(ValueError):
    """What is wrong with a file's content."""


def _decoded(path: Path) -> tuple[str, str]:
    """A file's text without the mark of UTF-8, or why it is none."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        return "", error.strerror or str(error)
    if reason := _no_text(raw, path):
        return "", reason
    try:
        return raw.decode("utf-8").removeprefix("\ufeff"), ""
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{raw[error.start]:02x}"
    # Few such bytes among others are an alphabet of one byte for each letter. Of which, is a guess;
    # where most bytes are such, a bad one.
    high = len(raw) - len(raw.translate(None, bytes(range(0x80, 0x100))))
    if 2 * high < len(raw) and _decodes(raw, "cp1252"):
        return "", (f"{byte}; it looks like cp1252 or another single-byte encoding; "
                    f"{_convert('CP1252', path)}")
    return "", f"{byte}; its encoding cannot be told; {_convert('ENCODING', path)}"


def _no_text(raw: bytes, path: Path) -> str:
    for mark, name in _MARKS.items():
        if raw.startswith(mark):
            return f"bytes 0 to {len(mark) - 1} are the mark of {name}; {_convert(name, path)}"
    for magic, name in _OTHER_FILES.items():
        if raw.startswith(magic):
            return f"its first bytes are those of {name}; give the text that is in it"
    place = raw.find(b"\0")
    if place < 0:
        return ""
    sample = raw[:4096]
    for name, zeros in (("UTF-16LE", sample[1::2]), ("UTF-16BE", sample[::2])):
        if 2 * zeros.count(0) > len(zeros) and sample.count(0) < 0.6 * len(sample):
            return f"byte {place} is zero; it looks like {name}; {_convert(name, path)}"
    return f"byte {place} is zero, so it is no text; take out what is binary"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        return bool(raw.decode(encoding))
    except UnicodeDecodeError:
        return False


def _convert(encoding: str, path: Path) -> str:
    converted = path.with_stem(f"{path.stem}-utf8")
    return (f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} "
            f"> {shlex.quote(str(converted))}")


def _json(path: Path, kind: str) -> Table:
    content, reason = _decoded(path)
    if reason:
        raise _Damaged(reason)
    rows = _rows(content, kind)
    if not rows:
        raise _Damaged("it has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(names, lambda name: [row.get(name) for row in rows])


def _rows(content: str, kind: str) -> list[dict[str, Any]]:
    """Objects, one on each line, or in one array; a .json file may also be a single one."""
    array = content.lstrip()[:1] == "["
    if array or kind == "json":
        try:
            whole = _parsed(content)
        except json.JSONDecodeError as error:
            if array or error.msg != "Extra data":  # else objects on lines
                raise _Damaged(f"line {error.lineno}: {error.msg}") from error
        else:
            rows = whole if isinstance(whole, list) else [whole]
            return [_object(row, f"item {number}") for number, row in enumerate(rows, 1)]
    rows = []
    # Not splitlines(): a string may hold other characters that end lines.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_object(_parsed(line), f"line {number}"))
            except json.JSONDecodeError as error:
                raise _Damaged(f"line {number}: {error.msg} at character "
                               f"{error.colno}") from error
    return rows


def _parsed(content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        raise json.JSONDecodeError(str(error).splitlines()[0], content, 0) from error


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _Damaged(f"{place} is a {type(row).__name__}, not an object with columns")
    return row


def _parquet(path: Path, field: str) -> Table:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    def column(name: str) -> list[Any]:
        try:
            with path.open("rb") as file:
                return ParquetFile(file).read(columns=[name]).column(name).to_pylist()
        except (ArrowException, OSError, ValueError, KeyError) as error:
            raise InputError(f"{field}: {path} is not readable as parquet: column "
                             f"{name!r}: {_line(error)}") from error

    try:
        with path.open("rb") as file:  # a path's characters could stand for more than one file
            return Table(ParquetFile(file).schema_arrow.names, column)
    except (ArrowException, OSError, ValueError) as error:
        raise _Damaged(_line(error)) from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Texts by name: built in, local files, and hub data sets that need no loading script."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.data import pydocs
from bipdeploy.errors import InputError, did_you_mean

LOCAL_SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub, by an id that is plain parquet or json."""

    path: str
    config: str | None
    field: str
    splits: dict[str, str]  # our split names → theirs
    files: str | None = None  # the files of a split, where the hub does not name them itself
    rows: int | None = None  # how many of the first rows are plenty
    revision: str | None = None


_TRAIN_TEST = {"calibration": "train", "validation": "validation", "test": "test"}
HUB_SETS: dict[str, HubSet] = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text", _TRAIN_TEST),
    # The hub's own conversion to parquet: the set itself has a loading script, which is not run.
    "ptb": HubSet("ptb-text-only/ptb_text_only", None, "sentence", _TRAIN_TEST,
                  "penn_treebank/{split}/*.parquet", revision="refs/convert/parquet"),
    # One file is plenty, and the set is too large to fetch whole.
    "c4": HubSet("allenai/c4", None, "text",
                 {"calibration": "train", "validation": "validation", "test": "validation"},
                 "en/c4-{split}.00000-of-{count}.json.gz", rows=2_000),
    "alpaca": HubSet("yahma/alpaca-cleaned", None, "output",
                     {"calibration": "train", "validation": "train", "test": "train"}),
}
_C4_FILES = {"train": "01024", "validation": "00008"}


@dataclass(frozen=True)
class Text:
    """A text that was read: its documents and where they came from."""

    name: str
    split: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the documents' content."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()

    def joined(self) -> str:
        """All documents as one text, blank lines between them."""
        return "\n\n".join(self.documents)


def read(data: str, split: str, field: str = "text") -> Text:
    """Read a text by name, file or hub set. `split` is calibration, validation or test.

    Raises InputError with one line where it cannot be had or holds no text.
    """
    if data.startswith("builtin:"):
        if data != "builtin:pydocs":
            raise InputError(f"data: no built-in text {data!r}"
                             f"{did_you_mean(data, ['builtin:pydocs'])}")
        documents = pydocs.documents(_check_split(data, split, pydocs.SPLITS))
    elif data in HUB_SETS:
        documents = _from_hub(data, split)
    else:
        documents = _from_file(Path(data).expanduser(), field)
    if not any(document.strip() for document in documents):
        raise InputError(f"data: {data!r} (split {split}) holds no text")
    return Text(data, split, tuple(documents))


@dataclass(frozen=True)
class Records:
    """Rows with several columns that were read, and where they came from."""

    name: str
    split: str
    rows: tuple[dict[str, str], ...]

    @property
    def sha256(self) -> str:
        """Hash of the rows' content."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()


def records(data: str, split: str, columns: Sequence[str]) -> Records:
    """Rows with these columns, all as text; an absent value is empty.

    Raises InputError with one line where they cannot be had, or a column is missing.
    """
    if is_running_text(data):
        raise InputError(f"data: {data} has no columns {', '.join(columns)}; give a .jsonl or "
                         ".parquet file that has, or alpaca")
    table = (_hub_table(data, split) if data in HUB_SETS
             else _file_table(Path(data).expanduser()))
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise InputError(f"data: {data} has no column {missing[0]!r} (it has "
                         f"{', '.join(table.column_names)}); {', '.join(columns)} are needed")
    rows = tuple({name: "" if row[name] is None else str(row[name]) for name in columns}
                 for row in table.select_columns(list(columns)))
    if not rows:
        raise InputError(f"data: {data!r} (split {split}) holds no rows")
    return Records(data, split, rows)


def is_running_text(data: str) -> bool:
    """Whether a text has no columns, by its name."""
    return data.startswith("builtin:") or Path(data).suffix == ".txt"


def fingerprint(data: str, split: str) -> str:
    """What changes when the text does, without reading more than a local file."""
    path = Path(data).expanduser()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{data}:{split}:python-{sys.version.split()[0]}"


def check(data: str) -> str | None:
    """What is wrong with a text's name, without network; None where nothing is."""
    if data.startswith("builtin:"):
        if data == "builtin:pydocs":
            return None
        return f"no built-in text {data!r}{did_you_mean(data, ['builtin:pydocs'])}"
    if data in HUB_SETS:
        return None
    path = Path(data).expanduser()
    if path.suffix not in LOCAL_SUFFIXES:
        return (f"{data!r} is neither a .txt, .jsonl or .parquet file nor a known text"
                f"{did_you_mean(data, [*HUB_SETS, 'builtin:pydocs'])}")
    if not path.is_file():
        return f"there is no file {data!r}"
    return None if path.stat().st_size else f"{data!r} is empty"


def _check_split(data: str, split: str, known: tuple[str, ...]) -> str:
    if split not in known:
        raise InputError(f"split: {data} has no split {split!r}{did_you_mean(split, known)}")
    return split


def _from_file(path: Path, field: str) -> list[str]:
    fault = check(str(path))
    if fault:
        raise InputError(f"data: {fault}")
    if path.suffix == ".txt":
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data: {path} is not readable UTF-8 text: {error}") from error
    rows = _file_table(path)
    if field not in rows.column_names:
        raise InputError(f"field: {path} has no column {field!r}"
                         f"{did_you_mean(field, rows.column_names)}")
    return [str(value) for value in rows[field] if value is not None and str(value).strip()]


def _file_table(path: Path) -> Any:
    """The rows of a local file, as a `datasets.Dataset`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    fault = check(str(path))
    if fault:
        raise InputError(f"data: {fault}")
    try:
        return load_dataset(LOCAL_SUFFIXES[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, OSError, ValueError, StopIteration) as error:
        line = (str(error).strip() or "it has no rows").splitlines()[0]
        raise InputError(f"data: {path} is not readable as {path.suffix[1:]}: {line}") from error


def _from_hub(name: str, split: str) -> list[str]:
    # Blank rows stay: the published perplexities join all rows by blank lines.
    return [str(value) for value in _hub_table(name, split)[HUB_SETS[name].field]]


def _hub_table(name: str, split: str) -> Any:
    """The rows of a hub set, as a `datasets.Dataset`."""
    from datasets import load_dataset

    hub = HUB_SETS[name]
    theirs = hub.splits[_check_split(name, split, tuple(hub.splits))]
    files = ({theirs: hub.files.format(split=theirs, count=_C4_FILES.get(theirs))}
             if hub.files else None)
    part = theirs if hub.rows is None else f"{theirs}[:{hub.rows}]"
    try:
        return load_dataset(hub.path, hub.config, data_files=files, split=part,
                            revision=hub.revision)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data: {name} ({hub.path}) could not be had from the hub: {line[:160]}; "
                         "offline, use builtin:pydocs or a local .txt or .jsonl file") from error

"""Texts by name: built in, local files, and hub data sets that need no loading script."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bipdeploy.data import chat, columns, files, pydocs
from bipdeploy.data.chat import Conversation
from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.model.hub import cache_fault


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
    """A text that was read: its documents and where they came from.

    Of `conversations` the documents are what was said, for comparing; `windows` has a model's chat
    template write them.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    conversations: tuple[Conversation, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the documents' content."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode() + b"\0")
        if self.conversations:
            digest.update(json.dumps(self.conversations).encode())
        return digest.hexdigest()

    def joined(self) -> str:
        """All documents as one text, blank lines between them."""
        return "\n\n".join(self.documents)

    def sizes(self) -> list[int]:
        """Characters of each document."""
        return [len(document) for document in self.documents]

    def take(self, places: Iterable[int]) -> Text:
        """Some of the documents, in the order of `places`."""
        chosen = tuple(places)
        return replace(self, documents=tuple(self.documents[p] for p in chosen),
                       conversations=tuple(self.conversations[p] for p in chosen)
                       if self.conversations else ())


def read(data: str, split: str, field: str = "text", section: str = "",
         key: str = "data") -> Text:
    """Read a text by name, file or hub set. `split` is calibration, validation or test; `section`
    is the recipe's, and `key` names the text in it, for messages.

    Raises InputError with one line where it cannot be had or holds no text.
    """
    where = f"{section}." if section else ""
    named = where + key
    conversations: list[Conversation] = []
    if data.startswith("builtin:"):
        if data != "builtin:pydocs":
            raise InputError(f"{named}: no built-in text {data!r}"
                             f"{did_you_mean(data, ['builtin:pydocs'])}")
        documents = pydocs.documents(_check_split(data, split, pydocs.SPLITS, where))
    elif data in HUB_SETS:
        own = HUB_SETS[data].field
        # Blank rows stay: the published perplexities join all rows by blank lines.
        documents, conversations = columns.read(
            _hub_table(data, split, where, named).column(own),
            f"{named}: {data}: column {own!r}", blanks=True)
    else:
        documents, conversations = _from_file(data, field, where, named)
    documents = documents or [chat.said(messages) for messages in conversations]
    if not any(document.strip() for document in documents):
        raise InputError(f"{named}: {data!r} (split {split}) holds no text")
    return Text(data, split, tuple(documents), tuple(conversations))


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

    def sizes(self) -> list[int]:
        """Characters of each row."""
        return [sum(map(len, row.values())) for row in self.rows]

    def take(self, places: Iterable[int]) -> Records:
        """Some of the rows, in the order of `places`."""
        return replace(self, rows=tuple(self.rows[place] for place in places))


def records(data: str, split: str, names: Sequence[str], section: str = "") -> Records:
    """Rows with these columns, all of them text; an absent value is empty.

    Raises InputError with one line where they cannot be had, a column is missing, or one holds
    what is no text.
    """
    where = f"{section}." if section else ""
    named = f"{where}data"
    if is_running_text(data):
        raise InputError(f"{named}: {data} has no columns {', '.join(names)}; give a .jsonl "
                         "or .parquet file that has, or alpaca")
    table = (_hub_table(data, split, where, named) if data in HUB_SETS
             else files.table(_require_file(data, named), named))
    missing = [name for name in names if name not in table.names]
    if missing:
        raise InputError(f"{named}: {data} has no column {missing[0]!r} (it has "
                         f"{', '.join(table.names)}); {', '.join(names)} are needed"
                         + _conversations_in(table.names, f"{where}format: text and {where}field"))
    found = [columns.texts(table.column(name), f"{named}: {data}: column {name!r}")
             for name in names]
    rows = tuple(dict(zip(names, row, strict=True)) for row in zip(*found, strict=True))
    if not rows:
        raise InputError(f"{named}: {data!r} (split {split}) holds no rows")
    return Records(data, split, rows)


def is_running_text(data: str) -> bool:
    """Whether a text has no columns, by its name."""
    return data.startswith("builtin:") or Path(data).suffix.lower() == ".txt"


def fingerprint(data: str, split: str) -> str:
    """What changes when the text does, without reading more than a local file.

    Raises InputError where the file cannot be read.
    """
    path = files.located(data)
    if path.is_file():
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"data: {data!r} cannot be read: {error.strerror}") from error
    return f"{data}:{split}:python-{sys.version.split()[0]}"


def check(data: str) -> str | None:
    """What is wrong with a text's name, without network; None where nothing is."""
    if data.startswith("builtin:"):
        if data == "builtin:pydocs":
            return None
        return f"no built-in text {data!r}{did_you_mean(data, ['builtin:pydocs'])}"
    if data in HUB_SETS:
        return None
    path = files.located(data)
    if path.suffix.lower() not in files.SUFFIXES:
        return (f"{data!r} is neither a .txt, .jsonl or .parquet file nor a known text"
                f"{did_you_mean(data, [*HUB_SETS, 'builtin:pydocs'])}")
    return files.fault(path)


def _check_split(data: str, split: str, known: tuple[str, ...], where: str) -> str:
    if split not in known:
        raise InputError(f"{where}split: {data} has no split {split!r}"
                         f"{did_you_mean(split, known)}")
    return split


def _require_file(data: str, named: str) -> Path:
    if fault := check(data):
        raise InputError(f"{named}: {fault}")
    return files.located(data)


def _from_file(data: str, field: str, where: str,
               named: str) -> tuple[list[str], list[Conversation]]:
    path = _require_file(data, named)
    if is_running_text(data):
        return [files.running(path, named)], []
    table = files.table(path, named)
    if field not in table.names:
        raise InputError(f"{where}field: {path} has no column {field!r}"
                         f"{did_you_mean(field, table.names)}"
                         + _conversations_in(table.names, f"{where}field"))
    return columns.read(table.column(field), f"{where}field: {path}: column {field!r}")


def _conversations_in(names: Sequence[str], setting: str) -> str:
    """What to set where a column has a name that conversations have."""
    usual = [name for name in chat.COLUMNS if name in names]
    return f"; set {setting}: {usual[0]}" if usual else ""


def _hub_table(name: str, split: str, where: str, named: str) -> files.Table:
    from datasets import config, load_dataset

    hub = HUB_SETS[name]
    theirs = hub.splits[_check_split(name, split, tuple(hub.splits), where)]
    paths = ({theirs: hub.files.format(split=theirs, count=_C4_FILES.get(theirs))}
             if hub.files else None)
    part = theirs if hub.rows is None else f"{theirs}[:{hub.rows}]"
    try:
        rows = load_dataset(hub.path, hub.config, data_files=paths, split=part,
                            revision=hub.revision)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        full = cache_fault(error, str(config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE")
        if full:
            raise InputError(full) from error
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{named}: {name} ({hub.path}) could not be had from the hub: "
                         f"{line[:160]}; offline, use builtin:pydocs or a local .txt or .jsonl "
                         "file") from error
    return files.Table(rows.column_names, lambda column: rows[column])

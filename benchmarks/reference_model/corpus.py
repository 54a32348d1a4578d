"""Make the training text of `builtin:pico`: docstrings of permissively licensed PyPI packages.

    python benchmarks/reference_model/corpus.py --out /tmp/pico

Downloads each package's wheel with pip, reads the docstrings of its modules (never imports
them), refuses a package whose metadata does not name a permissive licence, drops every
paragraph that Python's own documentation (`builtin:pydocs`) also holds, trains the tokenizer
and writes `train.bin` and `heldout.bin` (uint16 tokens), `tokenizer.json` and `corpus.json`.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from bipdeploy.data import pydocs

PACKAGES = (Path(__file__).parent / "packages.txt").read_text().split()

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|Zlib|HPND|Unlicense|Public Domain|PSF|0BSD)", re.I)
COPYLEFT = re.compile(r"\b(A?L?GPL|Mozilla|MPL|EPL|CeCILL|Proprietary|Non-?Commercial)", re.I)
SKIPPED = re.compile(r"(^|/)(tests?|_vendor|vendored?|externals)/")
PER_PACKAGE_CHARS = 3_000_000  # so that no single library's vocabulary dominates
HELD_OUT = 50  # one document in this many is held out
VOCABULARY = 4096


def download(name: str, folder: Path) -> Path | None:
    """The wheel of `name`, downloaded unless it is there already; None where pip finds none."""
    target = folder / name
    if not list(target.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
                   "--only-binary=:all:", "--dest", str(target), name]
        subprocess.run(command, check=False, capture_output=True)
    return next(iter(sorted(target.glob("*.whl"))), None)


def licence(wheel: zipfile.ZipFile) -> tuple[str, str]:
    """(version, licence) as the wheel's own metadata states them."""
    path = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    meta = email.message_from_bytes(wheel.read(path))
    stated = [str(meta.get("License-Expression") or ""),
              str(meta.get("License") or "")[:120].split("\n")[0]]
    stated += [str(c).split("::")[-1].strip() for c in meta.get_all("Classifier") or []
               if str(c).startswith("License")]
    return str(meta["Version"]), "; ".join(dict.fromkeys(s.strip() for s in stated if s.strip()))


def documents(wheel: zipfile.ZipFile) -> list[tuple[str, str]]:
    found = []
    for name in sorted(wheel.namelist()):
        if not name.endswith(".py") or SKIPPED.search(name):
            continue
        try:
            text = pydocs.docstrings(wheel.read(name).decode("utf-8"), name[:-3].replace("/", "."))
        except (SyntaxError, ValueError, UnicodeDecodeError, RecursionError):
            continue
        if len(text) > 200:
            found.append((name, text))
    return found


def build(out: Path, names: list[str]) -> None:
    seen: set[str] = set()
    for split in pydocs.SPLITS:
        list(pydocs.distinct([("", text) for text in pydocs.documents(split)], seen))
    texts: dict[str, list[str]] = {"train": [], "heldout": []}
    card = []
    for name in names:
        path = download(name, out / "wheels")
        if path is None:
            print(f"{name}: no wheel, left out")
            continue
        with zipfile.ZipFile(path) as wheel:
            version, stated = licence(wheel)
            if COPYLEFT.search(stated) or not PERMISSIVE.search(stated):
                print(f"{name} {version}: licence {stated!r} is not plainly permissive, left out")
                continue
            used = 0
            for document, text in pydocs.distinct(documents(wheel), seen):
                if used > PER_PACKAGE_CHARS:
                    break
                used += len(text)
                held = int(hashlib.sha256(document.encode()).hexdigest(), 16) % HELD_OUT == 0
                texts["heldout" if held else "train"].append(text)
        card.append({"package": name, "version": version, "licence": stated, "characters": used})
        print(f"{name} {version}: {used:,} characters, {stated}", flush=True)
    encode(out, texts, card)


def encode(out: Path, texts: dict[str, list[str]], card: list[dict]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts["train"][::4], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    counts = {}
    for split, documents_ in texts.items():
        ids: list[np.ndarray] = []
        for start in range(0, len(documents_), 512):
            for encoding in tokenizer.encode_batch(documents_[start:start + 512]):
                ids.append(np.array([0, *encoding.ids], dtype=np.uint16))
        order = np.random.default_rng(0).permutation(len(ids))
        tokens = np.concatenate([ids[i] for i in order])
        tokens.tofile(out / f"{split}.bin")
        counts[split] = {"tokens": len(tokens), "characters": sum(map(len, documents_)),
                         "documents": len(documents_)}
    (out / "corpus.json").write_text(json.dumps({"splits": counts, "packages": card}, indent=1))
    print(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for wheels and tokens")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    build(arguments.out, PACKAGES)

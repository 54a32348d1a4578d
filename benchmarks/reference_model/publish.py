"""Put a trained model into the package as `builtin:pico`, with its card.

    python benchmarks/reference_model/publish.py --data /tmp/pico --model /tmp/pico/model

Measures what the card states: held-out perplexity, perplexity on `builtin:pydocs` (test), and how
much of that text also stands in the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from bipdeploy.data import pydocs, text, windows
from bipdeploy.measuring.perplexity import forward_of, perplexity
from bipdeploy.model import loading
from bipdeploy.model.sources import BUILTIN_FOLDER
from bipdeploy.running.artifacts import write_json
from bipdeploy.running.machine import hardware

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json")
GRAM = 13

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# pico

A LLaMA of {parameters:,} parameters, trained for bipdeploy so that pruning, repair and serving
can be tried and tested on a real trained model on every machine. It continues English technical
prose for a line or two; it is of no other use.

| | |
|---|---|
| architecture | LLaMA: {blocks} blocks, hidden size {hidden}, FFN {ffn}, tied, bf16 |
| heads | {heads} of {head_dim} |
| tokenizer | byte-level BPE, {vocabulary:,} entries, trained on the same text |
| context | {context} tokens |
| tokens seen | {tokens:,} ({per_parameter:.1f} per parameter), of {unique:,} distinct |
| seed | {seed} |
| training | {steps:,} steps of {batch} windows, bf16, Muon and AdamW |
| training time | {hours:.1f} hours on 2 cores ({cpu}), shared with other work |
| held-out perplexity | {heldout:.2f} (windows of 256, documents of the same packages) |
| perplexity on `builtin:pydocs`, test | {pydocs:.2f} (windows of 128, Python {python}) |

Made by `benchmarks/reference_model/`: `corpus.py`, `train.py`, `publish.py`.

## Training text

Signatures and docstrings, read from the wheels of {packages} PyPI packages; no code, no doctests. A
package whose metadata does not name a permissive licence was left out, and so was every paragraph
of 60 characters or more that Python's own documentation also holds. {overlap:.2%} of the 13-word
sequences of `builtin:pydocs` (test) stand in the training text all the same, in other paragraphs.

Licences as the packages state them: {licences}.

<details><summary>Packages</summary>

| package | version | licence | characters |
|---|---|---|---|
{rows}

</details>
"""


def training_overlap(data: Path) -> dict[str, float]:
    """By split of `builtin:pydocs`: the share of its 13-word sequences in the training text."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    tokens = np.fromfile(data / "train.bin", dtype=np.uint16)
    starts = np.flatnonzero(tokens == 0)
    wanted = {split: set(grams("\n\n".join(pydocs.documents(split)))) for split in pydocs.SPLITS}
    anywhere = set().union(*wanted.values())
    found: set[int] = set()
    for part in np.array_split(starts, max(1, len(starts) // 500)):
        bounds = [*part, starts[min(np.searchsorted(starts, part[-1]) + 1, len(starts) - 1)]]
        batch = [tokens[a + 1:b].tolist() for a, b in pairwise(bounds)]
        for document in tokenizer.decode_batch(batch):
            found.update(anywhere.intersection(grams(document)))
    return {split: len(found & own) / len(own) for split, own in wanted.items()}


def grams(document: str) -> list[int]:
    words = document.lower().split()
    return [hash(tuple(words[i:i + GRAM])) for i in range(len(words) - GRAM + 1)]


def licence_name(stated: str) -> str:
    """One word for a licence as metadata states it."""
    lowered = stated.lower()
    return next((name for name in ("Apache", "BSD", "MIT", "ISC", "HPND", "PSF", "Zlib")
                 if name.lower() in lowered), "other permissive")


def card(data: Path, model: Path, overlap: dict[str, float]) -> str:
    corpus = json.loads((data / "corpus.json").read_text())
    log = json.loads((model / "training.json").read_text())
    config = json.loads((model / "config.json").read_text())
    last = log["history"][-1]
    ids = windows.token_ids(text.read("builtin:pydocs", "test"), model)
    loaded = loading.load_model(model, torch.float32, torch.device("cpu"))
    used = [p for p in corpus["packages"] if p["characters"]]
    licences = Counter(licence_name(p["licence"]) for p in used)
    return CARD.format(
        parameters=log["parameters"], blocks=config["num_hidden_layers"],
        hidden=config["hidden_size"], heads=config["num_attention_heads"],
        head_dim=config["head_dim"], ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"], context=config["max_position_embeddings"],
        tokens=last["tokens"], per_parameter=last["tokens"] / log["parameters"],
        unique=log["train_tokens_unique"], seed=log["seed"], steps=last["step"],
        batch=log["batch"], hours=last["seconds"] / 3600, cpu=hardware()["cpu"],
        heldout=math.exp(last["heldout_loss"]),
        pydocs=perplexity(forward_of(loaded), ids, 128, 16).perplexity,
        python=platform.python_version(), packages=len(used), overlap=overlap["test"],
        licences=", ".join(f"{name} ({count})" for name, count in licences.most_common()),
        rows="\n".join(f"| {p['package']} | {p['version']} | {p['licence']} | {p['characters']:,} |"
                       for p in used))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--only-overlap", action="store_true", help="measure the overlap, and stop")
    arguments = parser.parse_args()
    measured = arguments.data / "overlap.json"
    if not measured.exists():
        write_json(measured, training_overlap(arguments.data))
    print(measured.read_text())
    if arguments.only_overlap:
        return
    target = BUILTIN_FOLDER / "pico"
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(arguments.model / name, target / name)
    (target / "README.md").write_text(
        card(arguments.data, arguments.model, json.loads(measured.read_text())))
    shutil.copyfile(arguments.model / "training.json", target / "training.json")


if __name__ == "__main__":
    main()

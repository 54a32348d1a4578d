"""Pruning methods side by side on a real model: every part of the table, and the table.

    python benchmarks/real_tables.py --out runs/smollm2                    all parts, one by one
    python benchmarks/real_tables.py --out runs/smollm2 --only searched    one of them
    python benchmarks/real_tables.py --out runs/smollm2 --collect FILE.json
    python benchmarks/real_tables.py --list

Each part is `bipdeploy compare recipes/compare-smollm2.yaml` with settings of its own, into a
folder of its own; what is there already is not measured again, and parts may run side by side. The
model and the texts are those of `real_models.py` (C4 and code, of each the last fifth for the test)
unless --model and --texts say others; training has Wikipedia. The main test text is --test, or
WikiText-2 from the hub.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_models
from bipdeploy.errors import InputError
from bipdeploy.running import artifacts

RECIPE = Path(__file__).parents[1] / "recipes" / "compare-smollm2.yaml"
HELD_BACK = 5  # of so many documents the last is for the test


@dataclass(frozen=True)
class Part:
    """Methods that are compared under the same settings."""

    methods: tuple[str, ...]
    repairs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ratios: tuple[float, ...] = (0.2, 0.3, 0.5)
    texts: Mapping[str, float] = field(default_factory=lambda: {"c4.jsonl": 1.0})  # and shares


CHANNELS = {"prune.heads": False}  # three KV heads: uniform widths could only lose a third of them
BOTH = {"prune.heads": "both"}
LONG = {"calibration.samples": 48, "calibration.tokens": 1024, "calibration.batch": 4,
        "prune.search.windows": 12}
JOINT = "llm_bip_joint"
SEARCHED = f"{JOINT}@searched"
PARTS = {
    # With a fixed ridge of 0.01, as OSSCAR and ZipLM damp their Gram matrices.
    "published": Part(("wanda_sp", "flap", "taylor", "osscar", "llm_bip"),
                      ("none", "bias", "refit"), {**CHANNELS, "recover.refit.ridge": 0.01}),
    "published-heads": Part(("flap@adaptive",), ("none", "bias", "refit"),
                            {"recover.refit.ridge": 0.01}),
    "uniform": Part((JOINT, "osscar", "llm_bip"), ("refit",), CHANNELS),
    "searched-channels": Part((SEARCHED,), ("none", "refit"), CHANNELS),
    "searched": Part((SEARCHED,), ("none", "refit")),
    "searched-queries": Part((SEARCHED,), ("none", "refit"), BOTH),
    # 49k tokens instead of 16k, in windows that show what attention carries across them.
    "searched-long": Part((SEARCHED,), ("none", "refit"), LONG),
    "searched-mixed": Part((SEARCHED,), ("none", "refit"), LONG,
                           texts={"c4.jsonl": 0.5, "code.txt": 0.3, "technical.txt": 0.2}),
    "measured": Part((SEARCHED,), ("refit",), {"prune.search.propagation": "measured"}),
    "rounds": Part((SEARCHED,), ("refit",), {"prune.search.rounds": 3}),
    # With the recipe's ridge, chosen on held-back windows; 60 generations instead of 200.
    "evolved": Part((f"{JOINT}@evolved",), ("refit",), {"prune.search.generations": 60}),
    "learned": Part((f"{JOINT}@learned",), ("none", "refit")),
    "trained": Part((SEARCHED,), ("refit+lora", "refit+distil"), {}, {"taylor": ("lora",)}),
    **{f"windows-{count}-ridge-{ridge}": Part(
        (JOINT,), ("refit",), {**CHANNELS, "calibration.samples": count,
                               "recover.refit.ridge": ridge}, ratios=(0.3,))
       for count in (32, 128, 256) for ridge in (0.01, 0.1, "auto")},
}


def split(text: Path, place: Path) -> tuple[Path, Path]:
    """A text's two parts: to calibrate on, and to test on."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    if text.suffix == ".jsonl":  # a document a line
        test = lines[HELD_BACK - 1::HELD_BACK]
        rest = [line for number, line in enumerate(lines, 1) if number % HELD_BACK]
    else:
        at = len(lines) - len(lines) // HELD_BACK
        rest, test = lines[:at], lines[at:]
    place.mkdir(parents=True, exist_ok=True)
    found = []
    for name, own in (("calibration", rest), ("test", test)):
        path = place / f"{text.stem}-{name}{text.suffix}"
        partial = path.with_name(f".{path.name}.{os.getpid()}")  # parts may start side by side
        partial.write_text("".join(own), encoding="utf-8")
        partial.replace(path)
        found.append(path)
    return found[0], found[1]


def command(name: str, asked: argparse.Namespace, place: Path) -> list[str]:
    """The command line of a part."""
    part = PARTS[name]
    halves = {name: split(asked.texts / name, place) for name in {"c4.jsonl", "code.txt",
                                                                  *part.texts}}
    settings = {
        "model.id": str(asked.model), "tune.data": str(asked.texts / "wikipedia.jsonl"),
        "calibration.data": (str(halves["c4.jsonl"][0]) if len(part.texts) == 1 else [
            {"source": str(halves[name][0]), "share": share}
            for name, share in part.texts.items()]),
        "evaluate.perplexity.data": asked.test,
        "evaluate.perplexity.texts": {Path(name).stem: {"data": str(halves[name][1])}
                                      for name in ("c4.jsonl", "code.txt")},
        "compare.methods": list(part.methods), "compare.repairs": list(part.repairs),
        "compare.also": {method: list(own) for method, own in part.also.items()},
        "compare.ratios": list(part.ratios), "compare.seeds": asked.seed or [0], **part.settings}
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return [sys.executable, "-m", "bipdeploy", "compare", str(RECIPE), "--out",
            str(asked.out / name), *(word for own in words for word in ("--set", own))]


def collected(out: Path) -> dict[str, Any]:
    """All parts' records, by the name of the part with its settings, and what they were measured
    on. Raises InputError where nothing was measured, or parts on other texts or machines."""
    parts, shared = {}, {}
    for name, part in PARTS.items():
        path = out / name / "compare.json"
        if path.is_file():
            data = artifacts.read_json(path)
            own = {key: data[key] for key in ("environment", "test", "dense")}
            if own != (shared := shared or own):
                raise InputError(f"{path}: measured on other texts, or elsewhere, than other parts")
            parts[name] = {"settings": {**part.settings, "calibration.texts": part.texts},
                           "records": data["records"]}
    if not parts:
        raise InputError(f"--out: no part has been measured in {out}")
    return {**shared, "parts": parts}


def rows(data: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the table: part, method, repair, ratio, ln(perplexity / dense) by text and window,
    seconds and peak memory of all stages after scoring."""
    dense = data["dense"]["perplexity"]
    for name, part in data["parts"].items():
        for record in part["records"]:
            found = [f"{record['perplexity'][text][w]['nats'] - dense[text][w]['nats']:.3f}"
                     for text in dense for w in dense[text]]
            costs = record["costs"].values()
            peak = max(cost.get("peak_gpu_memory_bytes", cost["peak_memory_bytes"])
                       for cost in costs)
            yield (name, record["method"], record["repair"], f"{record['ratio']:.0%}",
                   f"{1 - record['removed']:.3f}", *found,
                   f"{sum(cost['seconds'] for cost in costs):.1f}", f"{peak / 2**30:.1f}")


def table(data: Mapping[str, Any]) -> str:
    """The rows as Markdown; in brackets the dense model's perplexity."""
    columns = [f"{Path(text).stem} {w} ({math.exp(own['nats']):.2f})"
               for text, windows in data["dense"]["perplexity"].items()
               for w, own in windows.items()]
    head = ["part", "method", "repair", "ratio", "kept", *columns, "seconds", "GiB"]
    lines = [head, ["---"] * len(head), *rows(data)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of all parts")
    parser.add_argument("--only", choices=PARTS, action="append", default=[], metavar="PART")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="write what was measured into "
                        "one file, and print the table")
    parser.add_argument("--model", type=Path, help="folder or GGUF file of the model")
    parser.add_argument("--texts", type=Path, help="folder with c4.jsonl, code.txt, "
                        "technical.txt and wikipedia.jsonl")
    parser.add_argument("--test", default="wikitext2", help="main test text, by name or a file")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; default 0")
    asked = parser.parse_args()
    if asked.list or not asked.out:
        print("\n".join(PARTS))
        return 0
    if asked.collect:
        try:
            found = collected(asked.out)
            print(table(found))
            artifacts.write_json(asked.collect, found)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0
    asked.model = asked.model or real_models.have("smollm2-135m-instruct")
    asked.texts = asked.texts or real_models.have("texts")
    failed = 0
    for name in asked.only or PARTS:
        print(f"{name} …", flush=True)
        failed |= subprocess.run(command(name, asked, asked.out / "texts"), check=False).returncode
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

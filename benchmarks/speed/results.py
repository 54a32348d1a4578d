"""The result file: a record for each case, on the disk when it is written. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bipdeploy.running import artifacts

# Seconds of a case at 7B on a GPU, guessed high, until one like it has been measured. An H200 took
# 27 for score with making the model, 65 for decode, most of it compiling, 1 for prefill and slice.
GUESSED = {"score": 50, "decode": 120, "prefill": 30, "refit": 120, "slice": 30, "onnx": 360,
           "vllm": 420}


class Results:
    """Records by case, and the setups (hardware, versions, code, settings) that they come from.

    A record counts as done where it holds figures and its setup is the one at hand. What is
    measured anew replaces the record of that name; others stay, with their own setup.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any], command: str):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise artifacts.unwritable(path.parent, error) from error
        self.path, self.setup = path, artifacts.digest(setup)[:12]
        known = artifacts.read_json(path) if path.is_file() else {}
        self.records: dict[str, dict[str, Any]] = known.get("records", {})
        self._setups = {**known.get("setups", {}), self.setup: dict(setup)}
        self._commands: list[str] = known.get("commands", [])
        if command not in self._commands:
            self._commands.append(command)

    def done(self, case: str) -> bool:
        record = self.records.get(case, {})
        return "figures" in record and record["setup"] == self.setup

    def failed(self, case: str) -> bool:
        record = self.records.get(case, {})
        return "failed" in record and record["setup"] == self.setup

    def add(self, case: str, record: Mapping[str, Any]) -> None:
        """Keep a record: on the disk when this returns."""
        self.records[case] = {"setup": self.setup, **record}
        used = {own["setup"] for own in self.records.values()}
        artifacts.write_json(self.path, {
            "commands": self._commands,
            "setups": {name: self._setups[name] for name in self._setups if name in used},
            "records": self.records})
        for path in (self.path, self.path.parent):
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.close(number)

    def expected_seconds(self, case: str, work: float) -> float:
        """How long a case will take: as the longest of its shape and kind so far, and by its work
        where that is more; else by those of other shapes; else a guess."""
        shape, kind = case.split("/")[:2]
        known = [(name.split("/")[0], record) for name, record in self.records.items()
                 if name.split("/")[1] == kind and "seconds" in record
                 and record["setup"] == self.setup]
        alike = [record for own, record in known if own == shape] or [r for _, r in known]
        if not alike:
            return GUESSED[kind]
        largest = max(alike, key=lambda record: record["work"])
        return 1.2 * max(max(record["seconds"] for record in alike),
                         largest["seconds"] * work / largest["work"])


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Records as Markdown: medians, ratios with their quartiles, the ideal beside them."""
    lines = ["| case | dense | pruned | times as fast | ideal |", "|---|---|---|---|---|"]
    for name, record in records.items():
        if "figures" not in record:
            why = (f"not run: {record['not_run']}" if "not_run" in record
                   else f"failed: {record['failed']}")
            lines.append(f"| {name} | {why} | | | |")
            continue
        lines += [f"| {' | '.join(row)} |" for row in _rows(name, record["figures"])]
    return "\n".join(lines)


def _rows(name: str, figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    kind, batch = name.split("/")[1], _batch(name)
    if kind == "score":
        ratio, seconds = figures["score_over_forward"], figures["seconds"]
        peak = figures["peak_bytes"]["score"] / 2**30
        return [(name, f"{seconds['score']['median']:.2f} s, peak {peak:.1f} GiB", "",
                 f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) times a "
                 "forward pass", "")]
    if kind in ("slice", "refit"):
        peak = figures["peak_bytes"][kind] / 2**30
        return [(name, "", f"{figures['seconds'][kind]['median']:.2f} s, peak {peak:.1f} GiB",
                 "", "")]
    if kind == "onnx":
        return [_compared(f"{name}, {phase}", phase, batch, figures[phase],
                          figures["ideal_speedup"][phase]) for phase in ("prefill", "decode")]
    if kind == "vllm":
        spread = figures["spread"]
        measures = [key.removesuffix(".speedup") for key in spread if key.endswith(
            ("output_tokens.speedup", "ttft.p50.speedup"))]
        return [(f"{name}, {key.removeprefix('vllm.serve.')}",
                 f"{spread[f'{key}.dense']['median']:.1f}",
                 f"{spread[f'{key}.pruned']['median']:.1f}",
                 _spread(spread[f"{key}.speedup"]), "") for key in measures]
    return [_compared(name, kind, batch, figures, figures["ideal_speedup"])]


def _compared(name: str, phase: str, batch: int, found: Mapping[str, Any],
              ideal: float) -> tuple[str, ...]:
    seconds = [found["seconds"][which]["median"] for which in ("dense", "pruned")]
    shown = [f"{batch / s:.1f} tok/s" if phase == "decode" else f"{1e3 * s:.2f} ms"
             for s in seconds]
    return (name, *shown, _spread(found["speedup"]), f"{ideal:.2f}")


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _batch(name: str) -> int:
    return next((int(part[1:]) for part in name.split("/") if part[0] == "b"), 1)

"""Measured times of a model's parts at several widths: the table, its cache, and costs from it.

`measuring/profile.py` measures it. Imports no torch, so that a plan can read the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from bipdeploy.model.cost import Cost
from bipdeploy.model.families import Architecture, Heads, Width
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running import artifacts, machine

FORMAT = 2  # of the table, and of how it is measured
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Curve:
    """Seconds that one part of one block takes by its width, measured points ascending."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def rising(self) -> tuple[float, ...]:
        """The nearest seconds (least squares) that never fall with the width, and none below 0:
        where they were measured so, that is noise. Pools adjacent violators."""
        pools: list[tuple[float, int]] = []
        for value in self.seconds:
            mean, count = max(value, 0.0), 1
            while pools and pools[-1][0] > mean:
                earlier, size = pools.pop()
                mean, count = (earlier * size + mean * count) / (size + count), size + count
            pools.append((mean, count))
        return tuple(mean for mean, count in pools for _ in range(count))

    def at(self, width: int) -> float:
        """Seconds at a width: linear between the points and beyond them, 0 for a removed part."""
        points = list(zip(self.widths, self.rising, strict=True))
        if width == 0 or len(points) == 1:
            return points[0][1] * (width > 0)
        segment = next((pair for pair in pairwise(points) if width <= pair[1][0]), points[-2:])
        (left, below), (right, above) = segment
        return max(0.0, below + (above - below) * (width - left) / (right - left))


@dataclass(frozen=True)
class Phase:
    """Times of one phase. `heads`: by KV heads with all query heads of each; `queries`: with all KV
    heads by the query heads of each, None where it was not asked for. `rest`: all that no width
    changes (embeddings, norm, head, the loop).

    `times`: seconds of each whole model that was timed: median, low, high (quartiles).
    """

    heads: Curve
    ffn: Curve
    rest: float
    times: dict[str, dict[str, float]]
    check: dict[str, float]  # a model pruned in both parts at once: predicted and measured seconds
    queries: Curve | None = None

    @property
    def cost(self) -> Cost:
        at = cache(self._seconds)
        return Cost(lambda _, part, width: at(width), self.rest)

    def _seconds(self, width: Width) -> float:
        """Seconds of a part. Of an attention with fewer KV heads and fewer query heads of each:
        both savings one on the other."""
        if not isinstance(width, Heads):
            return self.ffn.at(width)
        whole = self.queries.at(self.queries.widths[-1]) if self.queries else 0.0
        share = self.queries.at(width.queries) / whole if self.queries and whole else 1.0
        return self.heads.at(width.kv) * share


@dataclass(frozen=True)
class Table:
    """All that was measured for a model's shape on one machine. `key` says which and where."""

    key: dict[str, Any]
    phases: dict[str, Phase]
    depth: int
    rounds: int
    seconds: float
    measured_on: dict[str, Any]

    @property
    def digest(self) -> str:
        return artifacts.digest(asdict(self))


def key(config: Mapping[str, Any], arch: Architecture, section: ModelSection, batch: int,
        context: int, queries: bool = False) -> dict[str, Any]:
    """All that times depend on: hardware, versions, type, threads, shape, batch, context; and
    whether fewer query heads are timed too."""
    environment = machine.environment()
    hardware = environment["hardware"]
    shape = {**asdict(arch), "family": arch.family.model_type,
             "sliding_window": config.get("sliding_window"),
             "blocks": [list(asdict(w).values()) for w in arch.blocks]}
    return {"format": FORMAT, "hardware": hardware,
            "libraries": {n: environment["libraries"][n] for n in ("torch", "transformers")},
            "device": "cpu" if section.device == "auto" and not hardware["gpus"]
            else section.device, "dtype": section.dtype,
            "stored": str(config.get("dtype") or config.get("torch_dtype")),
            "threads": os.environ.get("OMP_NUM_THREADS") or str(hardware["cores"]),
            "shape": shape, "batch": batch, "context": context,
            **({"queries": True} if queries else {})}


def folder(given: Path | None = None) -> Path:
    """Where tables are kept: `given`, or below the user's cache folder."""
    if given:
        return given
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "bipdeploy" / "profiles"


def lookup(wanted: Mapping[str, Any], where: Path | None = None) -> Table | None:
    """The cached table of a key, or None where there is none that can be read."""
    try:
        data = json.loads(_path(wanted, where).read_text(encoding="utf-8"))
        phases = {name: Phase(**{**p, **{part: Curve(**_points(p[part])) for part in (
            "heads", "ffn", "queries") if p.get(part)}})
                  for name, p in data["phases"].items()}
        table = Table(**{**data, "phases": phases})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return table if table.key == json.loads(json.dumps(wanted)) else None


def store(table: Table, where: Path | None = None) -> Path:
    """Write a table into the cache. Raises InputError where that cannot be written."""
    path = _path(table.key, where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise artifacts.unwritable(path.parent, error) from error
    artifacts.write_json(path, asdict(table))
    return path


def _path(wanted: Mapping[str, Any], where: Path | None) -> Path:
    return folder(where) / f"{artifacts.digest(wanted)[:24]}.json"


def _points(curve: Mapping[str, Sequence[float]]) -> dict[str, tuple]:
    return {name: tuple(values) for name, values in curve.items()}

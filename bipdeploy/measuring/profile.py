"""Times of a model's parts at several widths, in PyTorch, on this machine.

Whole models with random weights are timed as `torch_bench` times real ones: a stack of blocks as
deep as the model (or with as many blocks as fill `_BYTES`), so that the weights of a block have
left the caches when it comes round again. All variants read the same memory: each takes the first
rows' worth of every dense tensor's own region, as contiguous as in a real model. One part has its
width changed in all blocks at once; what a block's part takes is its share of the difference to the
model without that part. On one CPU thread the clock is the process's own CPU time, which is the
elapsed time of an idle machine: what else runs on a shared one does not count.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.measuring.timing import Spread, interleaved
from bipdeploy.measuring.torch_bench import generation, how
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.model.formats import pruned_config
from bipdeploy.planning import latency
from bipdeploy.planning.latency import Curve, Phase, Table
from bipdeploy.planning.resolved import Resolved
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running import machine
from bipdeploy.running.reporter import Reporter, Silent

POINTS = 6  # widths of each part
STEPS = 8  # decode steps timed in each round
ROUNDS, WARMUP = 7, 1
_BYTES = 4 << 30  # of the blocks that are timed; far above any last-level cache
_LEAST = 4  # blocks, however large


def timed(resolved: Resolved, reporter: Reporter | None = None) -> Resolved:
    """With the times that the target is about, from the cache or measured now."""
    if not resolved.times or resolved.table:
        return resolved
    return resolved.measured(obtain(resolved.times, resolved.config, resolved.architecture,
                                    resolved.recipe.model, reporter))


def obtain(key: dict[str, Any], config: Mapping[str, Any], arch: Architecture,
           section: ModelSection, reporter: Reporter | None = None, cache: Path | None = None, *,
           force: bool = False) -> Table:
    """The table of `latency.key`, from the cache or measured now and kept there."""
    table = None if force else latency.lookup(key, cache)
    if table is None:
        table = measure(key, config, arch, section, reporter or Silent())
        latency.store(table, cache)
    return table


@torch.inference_mode()
def measure(key: dict[str, Any], config: Mapping[str, Any], arch: Architecture,
            section: ModelSection, reporter: Reporter) -> Table:
    """Time every variant in interleaved rounds. Raises InputError where the context is too long."""
    began = time.time()
    if key["context"] + STEPS + 1 > arch.max_positions:
        raise InputError(f"a context of {key['context']} tokens and {STEPS + 1} timed ones pass "
                         f"the model's maximum of {arch.max_positions}; lower the context")
    device = compute_device(section)
    dtype = compute_dtype(section, config, device)
    block = max(arch.blocks, key=lambda w: (w.kv_heads, w.intermediate))
    size = dtype.itemsize * arch.block_parameters(0, block)
    depth = min(len(arch.blocks), max(_LEAST, _BYTES // size))
    variants = _variants(block, key.get("queries", False))
    stack = Stack(config, arch, depth, dtype, device)
    reporter.total(ROUNDS + WARMUP, "rounds")
    ids = torch.randint(arch.vocabulary, (key["batch"], key["context"]),
                        generator=torch.Generator().manual_seed(0)).to(device)
    models = {name: stack.model(widths) for name, widths in variants.items()}
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    generations = {name: generation(model, ids, STEPS + 1, clock)
                   for name, model in models.items()}
    runs = {name: generations[name.partition("/")[0]]
            for name in _order(list(variants))}
    times = pooled(interleaved(runs, ROUNDS, WARMUP, reporter.advance))
    phases = {phase: summarise({name: t[phase] for name, t in times.items()}, variants, depth)
              for phase in latency.PHASES}
    return Table(json.loads(json.dumps(key)), phases, depth, ROUNDS, round(time.time() - began, 1),
                 {"device": str(device), "dtype": str(dtype), "threads": torch.get_num_threads(),
                  "clock": clock.__name__, "decode": how(times["dense"]),
                  "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                  "environment": machine.environment()})


def _variants(dense: BlockWidths, queries: bool = False) -> dict[str, BlockWidths]:
    """By name: `dense`, and each part at every other width, removed (0) too; with `queries` also
    fewer query heads of each KV head; `check` has both parts at about 2/3."""

    def heads(k: int) -> BlockWidths:
        return replace(dense, heads=k * dense.group, kv_heads=k)

    found = {"dense": dense, "heads 0": heads(0), "ffn 0": replace(dense, intermediate=0)}
    found |= {f"heads {k}": heads(k) for k in spread(dense.kv_heads, dense.kv_heads)[:-1]}
    found |= {f"ffn {f}": replace(dense, intermediate=f)
              for f in spread(dense.intermediate, 16)[:-1]}
    if queries:
        found |= {f"queries {q}": replace(dense, heads=dense.kv_heads * q)
                  for q in spread(dense.group, dense.group)[:-1]}
    third = max(1, round(dense.kv_heads * 2 / 3))
    return {**found, "check": replace(heads(third), intermediate=dense.intermediate * 11 // 16)}


def _order(names: Sequence[str]) -> list[str]:
    """The order of a round: the dense model, which all others are set against, comes thrice."""
    others = [name for name in names if name != "dense"]
    third = -(-len(others) // 3)
    return [name for n in range(3)
            for name in (f"dense/{n}", *others[n * third:(n + 1) * third])]


def pooled(times: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Times by the name before the slash."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, measured in times.items():
        for phase, values in measured.items():
            found.setdefault(name.partition("/")[0], {}).setdefault(phase, []).extend(values)
    return found


def spread(dense: int, parts: int) -> list[int]:
    """At most `POINTS` widths, evenly spaced among the `parts` equal steps up to the dense one."""
    last = parts - 1
    steps = {round(i * last / (POINTS - 1)) + 1 for i in range(POINTS)} if parts > POINTS else (
        range(1, parts + 1))
    return sorted({max(1, dense * step // parts) for step in steps})


def summarise(times: Mapping[str, Sequence[float]], variants: Mapping[str, BlockWidths], depth: int
              ) -> Phase:
    """Seconds of each variant, by round, as curves.

    Other work on the machine only ever adds time, so a variant's time is the lower quartile of its
    rounds. The rest is what makes the dense model's parts add up to its own time.
    """
    spreads = {name: Spread.of(values) for name, values in times.items()}

    def curve(part: str, field: str, gone: str) -> Curve:
        points = {getattr(variants[name], field): spreads[name].low for name in times
                  if name.startswith(f"{part} ") or name in ("dense", gone)}
        without = points.pop(0)
        widths = sorted(points)
        return Curve(tuple(widths), tuple((points[w] - without) / depth for w in widths))

    heads = curve("heads", "kv_heads", "heads 0")
    ffn = curve("ffn", "intermediate", "ffn 0")
    queries = (curve("queries", "group", "heads 0")
               if any(name.startswith("queries ") for name in times) else None)
    whole, joint, dense = variants["dense"], variants["check"], spreads["dense"].low
    rest = dense - depth * (heads.at(whole.kv_heads) + ffn.at(whole.intermediate))
    phase = Phase(heads, ffn, max(rest, 0.0), {n: s.as_dict() for n, s in spreads.items()}, {},
                  queries)
    return replace(phase, check={
        "kv_heads": joint.kv_heads, "intermediate": joint.intermediate,
        "predicted": phase.cost.whole([joint] * depth), "measured": spreads["check"].low})


class Stack:
    """Models of one architecture at any widths, over the same random weights."""

    def __init__(self, config: Mapping[str, Any], arch: Architecture, depth: int,
                 dtype: torch.dtype, device: torch.device):
        self.config = {**config, "num_hidden_layers": depth}
        if self.config.get("layer_types"):
            self.config["layer_types"] = self.config["layer_types"][:depth]
        self.arch, self.depth, self.dtype, self.device = arch, depth, dtype, device
        self.regions: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator(device).manual_seed(0)

    def model(self, widths: BlockWidths) -> torch.nn.Module:
        """A model whose blocks all have these widths. Make the widest first: it sets the sizes."""
        from transformers import AutoModelForCausalLM

        made = pruned_config(self.config, self.arch, [widths] * self.depth)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(made))
            config = loading.load_config(Path(folder))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype,
                                                     trust_remote_code=False)
        model.load_state_dict({name: self._weight(name, p.shape)
                               for name, p in model.named_parameters()}, strict=False, assign=True)
        model.tie_weights()
        rotary = type(model.model.rotary_emb)
        model.model.rotary_emb = rotary(config=config).to(self.device)
        return model.eval().requires_grad_(False)

    def _weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        size = shape.numel()
        if name not in self.regions or self.regions[name].numel() < size:
            self.regions[name] = torch.empty(size, dtype=self.dtype, device=self.device).normal_(
                0, 0.02, generator=self._generator)
        return self.regions[name][:size].view(shape)



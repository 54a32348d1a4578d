"""Estimates from sizes alone: what every stage writes, holds in memory, and how long it takes.

They are estimates: text lengths, file systems and libraries add to them. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bipdeploy.errors import StageError
from bipdeploy.model import cost
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.planning.resolved import Resolved
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.recipe.prune import JUDGEMENTS
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.recover import RIDGES
from bipdeploy.recipe.tune import TuneSection, slice_tokens
from bipdeploy.running import machine

_OTHER = 2 << 20  # tokenizer, plots, manifests of a stage
TEST_TOKENS = 300_000  # of a test text whose length the recipe does not say


@dataclass(frozen=True)
class Sizes:
    """What the estimates are made from. `stored` and `computed`: bytes of a value. `gpu`: whether
    one computes."""

    recipe: Recipe
    dense: Architecture
    pruned: Architecture
    stored: int
    computed: int
    gpu: bool = False

    @property
    def weights(self) -> float:
        """Bytes of the pruned checkpoint."""
        return self.stored * self.pruned.parameters()


@dataclass(frozen=True)
class Stage:
    """One stage: bytes written, peak bytes of memory, and seconds (None: it computes nothing)."""

    writes: float
    memory: float
    seconds: float | None


def sizes(resolved: Resolved, pruned: Architecture) -> Sizes:
    """`stored`: as config.json says, 2 where it does not. `computed`: the recipe's, else float32
    unless a GPU is named or driven here."""
    recipe = resolved.recipe
    stored = cost.value_bytes(resolved.config) or 2
    asked = cost.value_bytes({"dtype": recipe.model.dtype})
    gpu = recipe.model.device != "cpu" and bool(
        recipe.model.device == "cuda" or recipe.hardware.gpu or machine.hardware()["gpus"])
    return Sizes(recipe, resolved.architecture, pruned, stored, asked or (stored if gpu else 4),
                 gpu)


def writes(s: Sizes) -> dict[str, float]:
    """Bytes that each stage writes, with what it needs on the way."""
    recipe, weights = s.recipe, s.weights
    export = float(_OTHER)  # what `transformers` writes are links
    if recipe.export.vllm.enabled:
        export += weights
    onnx = recipe.export.onnx
    if onnx.enabled:
        value = cost.value_bytes({"dtype": onnx.dtype}) or s.computed
        graph = s.pruned.parameters() * value
        # int4 has a scale for each 32 weights; embeddings stay whole.
        export += graph + sum(graph / value * {"int4": 0.65}.get(kind, 1.1)
                              + (value - 1) * s.pruned.vocabulary * s.pruned.hidden
                              for kind in onnx.quantize)
    groups = sum(w.kv_heads + w.heads + w.intermediate for w in s.dense.blocks)
    # A round's model, sliced and repaired, lies there until the last.
    rounds = 1 + 2 * (recipe.prune.rounds > 1)
    return {"score": 4 * groups + _OTHER, "curves": _OTHER, "prune": rounds * weights + _OTHER,
            "recover": weights * (recipe.recover.method != "none") + _OTHER,
            "tune": (weights + _checkpoints(s)) * recipe.tune.enabled + _OTHER, "export": export,
            "evaluate": _OTHER, "bench": _OTHER, "gate": _OTHER, "report": _OTHER}


def memory(s: Sizes) -> dict[str, float]:
    """Peak bytes of each stage beside the libraries' own: the embedding table, or two blocks, and
    the windows' hidden states where it walks; whole models where it evaluates and times them."""
    recipe, arch, value = s.recipe, s.dense, s.computed
    table = arch.vocabulary * arch.hidden
    block = max(arch.block_parameters(i) for i in range(len(arch.blocks)))
    widest = max(arch.blocks, key=lambda w: w.intermediate)
    calibration = recipe.calibration
    windows = calibration.windows * calibration.tokens * arch.hidden * value * (
        not calibration.spill)
    batch = calibration.batch * calibration.tokens * value * (
        4 * arch.hidden + 3 * widest.intermediate + 4 * widest.heads * arch.head_dim)
    walking = max(s.stored * table, 2 * block * value + batch) + windows
    needs = CRITERIA[recipe.score.criterion].needs
    # Sums over all pairs of inputs, their inverse, and what a round leaves of it; float64.
    dense_inputs, inputs = arch.widest, s.pruned.widest
    jointly = 8 * 3 * dense_inputs * (dense_inputs + arch.hidden)
    scoring = (walking + ("gradients" in needs) * windows * len(arch.blocks)
               + ("outer" in needs) * jointly)
    # Before, transformers reads the model block by block, its embeddings and head whole.
    scoring = max(scoring, (block + 2 * table) * value)
    held_back = recipe.recover.refit.ridge == "auto"  # what judges the ridges has a sum of its own
    gram = (jointly if recipe.recover.refit.reselect and recipe.recover.method == "refit"
            else 8 * ((2 + held_back) * inputs ** 2 + 3 * inputs * arch.hidden))
    writing = s.stored * max(table, 2 * block)
    whole = recipe.export.onnx.enabled or recipe.export.vllm.enabled
    searching = 0.0
    if recipe.prune.needs_curves:
        # The sum that all refits of a part are made from, what judges the ridges, and what is
        # solved.
        searching = walking + 8 * (3 + held_back) * dense_inputs * (
            dense_inputs + arch.hidden) + windows * (
            len(arch.blocks) if recipe.prune.search.propagation == "sensitivity" else
            2 + judged(recipe) * 2 * recipe.prune.search.points * len(arch.blocks))
    repairing = (walking + 3 * windows + gram) * (recipe.recover.method != "none")
    rounds = max(searching, scoring, repairing) * (recipe.prune.rounds > 1)
    learning = _learning(s) * (recipe.prune.layers == "learned")
    if recipe.prune.layers == "evolved":
        # The whole model with the output projections of all widths, half a dense one on average,
        # windows before and behind it, and a part's sums.
        projections = sum((w.heads * arch.head_dim + w.intermediate) * arch.hidden
                          for w in arch.blocks)
        rounds = value * (arch.parameters() + recipe.prune.search.points * projections / 2) + (
            batch + 3 * windows + 8 * (3 + held_back) * dense_inputs * (dense_inputs + arch.hidden)
            + 4 * 4 * calibration.batch * calibration.tokens * arch.vocabulary)
    bench, perplexity = recipe.bench.torch, recipe.evaluate.perplexity
    both = value * (arch.parameters() + s.pruned.parameters())
    cache = 2 * bench.batch * (bench.prompt_tokens + bench.new_tokens) * (
        arch.kv_bytes_per_token(bytes_per_value=value))
    longest = max(2048 if w == "max" else w for w in perplexity.windows)
    logits = 3 * 4 * arch.vocabulary * min(  # in float32, with what the loss makes of them
        perplexity.batch * min(longest, arch.max_positions), slice_tokens(arch.vocabulary))
    return {"score": scoring, "curves": searching, "prune": max(writing, rounds, learning),
            "recover": repairing,
            "tune": _training(s) * recipe.tune.enabled,
            "export": value * s.pruned.parameters() + writing if whole else
            max(2 * block, block + 2 * table) * value,
            "evaluate": value * arch.parameters() + logits, "bench": both + cache,
            "gate": 0.0, "report": 0.0}


# Bytes for each weight that is trained: float32, its gradient, and two moments. Beside these the
# CPU's memory holds the best values yet and, while it is written, a checkpoint.
_TRAINED, _KEPT = 16, 20


def _checkpoints(s: Sizes) -> float:
    """Bytes on the disk while all weights are trained: they, the best yet and both moments, of the
    checkpoint that is written and of the one before. Those of adapters are small."""
    return (2 * _TRAINED * s.pruned.parameters()) * (s.recipe.tune.method == "full")


def _training(s: Sizes) -> float:
    """Peak bytes of one training process: the model with what is trained of it, the teacher beside
    it where there is one, a slice's logits, and a pass's activations, kept for every block unless
    they are computed again; in the end the model as written beside the one that was trained."""
    tune, arch = s.recipe.tune, s.pruned
    tokens = -(-tune.batch // (tune.accumulation * tune.processes)) * tune.tokens
    kept = 1 if tune.gradient_checkpointing else len(arch.blocks)
    widest = max(arch.blocks, key=lambda w: w.intermediate)
    block = tokens * s.computed * (6 * arch.hidden + 4 * widest.intermediate
                                   + 4 * widest.heads * arch.head_dim)
    logits = (3 + 2 * (tune.kl > 0)) * 4 * arch.vocabulary * min(
        tokens, slice_tokens(arch.vocabulary))
    teacher = s.computed * s.dense.parameters() * tune.taught
    if tune.distillation.hidden:  # the outputs of all blocks, of either model
        block += 2 * tokens * s.computed * arch.hidden
    written = s.computed * arch.parameters()
    if tune.method == "lora":
        return written + logits + max(teacher + block * kept, written)
    # Loaded whole, then split; a copy in the type of the products is made in a pass.
    trained = _TRAINED * arch.parameters() / tune.processes + written * (s.computed < 4)
    trained += _KEPT * arch.parameters() * (not s.gpu)
    return logits + max(trained + teacher + block * kept, 4 * arch.parameters() + written)


def _learning(s: Sizes) -> float:
    """Peak bytes of learning widths: the dense model, which is its own teacher, a slice's logits of
    either, and a pass's activations, kept for every block. Frozen weights need no inputs kept."""
    section, arch = s.recipe.prune.learned, s.dense
    window = section.tokens or s.recipe.calibration.tokens
    tokens = section.batch // section.accumulation * window
    widest = max(arch.blocks, key=lambda w: w.intermediate)
    block = tokens * s.computed * (6 * arch.hidden + 4 * widest.intermediate
                                   + 4 * widest.heads * arch.head_dim)
    logits = 5 * 4 * arch.vocabulary * min(tokens, slice_tokens(arch.vocabulary))
    return s.computed * arch.parameters() + logits + block * len(arch.blocks)


def _learned(s: Sizes) -> float:
    """FLOPs of learning widths: the dense model forwards, the same with its multipliers, and as
    much backwards, since no weight has a gradient."""
    section = s.recipe.prune.learned
    window = section.tokens or s.recipe.calibration.tokens
    once = cost.flops(s.dense, window).whole(s.dense.blocks) + cost.head_flops(s.dense, window)
    judged = 2 * (1 + JUDGEMENTS) * section.held_back
    return once * (3 * section.steps * section.batch + judged)


def _passes(s: Sizes, tune: TuneSection) -> float:
    """FLOPs of a window of training: a pass forwards and twice as much backwards; of the teacher
    one forwards."""
    def of(arch: Architecture) -> float:
        return cost.flops(arch, tune.tokens).whole(arch.blocks)

    return 3 * of(s.pruned) + of(s.dense) * tune.taught


def seconds(s: Sizes, flops: float, bandwidth: float, single: float | None = None,
            double: float | None = None) -> dict[str, float | None]:
    """Time of each stage over a roofline: FLOP/s and bytes/s. Lower bounds, loading left out.

    `single` and `double`: FLOP/s in float32, which sums over tokens are made in, and in float64,
    which systems are solved in; both `flops` where they are not given.
    """
    recipe, arch, value = s.recipe, s.dense, s.computed
    calibration = recipe.calibration
    tokens = calibration.windows * calibration.tokens
    passes = calibration.windows * cost.flops(arch, calibration.tokens).whole(arch.blocks)
    weights = value * arch.parameters()

    def roof(work: float, moved: float) -> float:
        return max(work / flops, moved / bandwidth)

    def weighed(grams: float, solves: float) -> float:
        """As many FLOPs of the fast kind as take the same time."""
        return grams * flops / (single or flops) + solves * flops / (double or flops)

    scoring = passes
    if recipe.score.propagation == "measured":
        scoring += sum(w.kv_heads * 6 * tokens * arch.hidden * w.intermediate for w in arch.blocks)
    needs = CRITERIA[recipe.score.criterion].needs
    if "gradients" in needs:
        scoring += 3 * passes
    if "outer" in needs:  # the sums, their inverse, and the rounds
        scoring += sum(weighed(2 * tokens * size ** 2, 2 * size ** 3) for w in arch.blocks
                       for size in (w.heads * arch.head_dim, w.intermediate))
    searching = learning = evolving = 0.0
    if recipe.prune.tries_widths:
        search = recipe.prune.search
        points, share = search.points, judged(recipe)
        solving = sum(weighed(2 * tokens * size ** 2, points * 2 * size ** 3 / 3)
                      for w in arch.blocks for size in (w.heads * arch.head_dim, w.intermediate))
        if recipe.prune.layers == "evolved":
            # Of a generation all offspring see an eighth, a quarter a half, an eighth all windows;
            # the dense model's distributions are made again from its last hidden states.
            evolving = solving + passes + search.generations * search.offspring * 0.375 * share * (
                passes + 2 * calibration.windows * cost.head_flops(arch, calibration.tokens))
        else:
            searching = solving + passes * (
                3 + share * (3 + points) if search.propagation == "sensitivity" else
                1 + share * points * (len(arch.blocks) + 1))
    elif recipe.prune.layers == "learned":
        learning = _learned(s)
    pruned = calibration.windows * cost.flops(s.pruned, calibration.tokens).whole(s.pruned.blocks)
    # The sums, and a solution for every ridge that is tried.
    solutions = 1 + len(RIDGES) * (recipe.recover.refit.ridge == "auto")
    refit = sum(weighed(2 * tokens * size * size,
                        solutions * 2 * size ** 2 * (size / 3 + arch.hidden))
                for w in s.pruned.blocks for size in (w.heads * arch.head_dim, w.intermediate))
    # Once through the dense block, and thrice through the pruned one.
    repairing = (passes + 3 * pruned + refit) * (recipe.recover.method != "none")
    rounds = (recipe.prune.rounds - 1) * (scoring + searching + repairing)
    perplexity, bench = recipe.evaluate.perplexity, recipe.bench.torch
    test = len(perplexity.every) * (perplexity.max_tokens or TEST_TOKENS)
    read = 0.0
    for window in (min(2048, arch.max_positions) if w == "max" else w for w in perplexity.windows):
        for model in (arch, s.pruned):
            read += test / window * (cost.flops(model, window).whole(model.blocks)
                                     + cost.head_flops(model, window))
    timed = 0.0
    for model in (arch, s.pruned):
        phases = roofline(model, value, bench.batch, bench.prompt_tokens, flops, bandwidth)
        timed += (bench.repeats + bench.warmup + bench.memory) * (
            phases["prefill"] + bench.new_tokens * phases["decode"])
    moved, tune = s.stored * arch.parameters() + s.weights, recipe.tune
    return {"score": roof(scoring, weights),
            "curves": roof(searching, 2 * weights) * recipe.prune.needs_curves,
            "prune": roof(rounds + learning + evolving, 2 * moved),
            "recover": roof(repairing, 2 * moved) * (recipe.recover.method != "none"),
            "tune": roof(tune.steps * tune.batch * _passes(s, tune),
                         tune.steps * weights) * tune.enabled,
            "export": roof(0, 2 * s.weights),
            "evaluate": roof(read, 2 * weights) * perplexity.enabled,
            "bench": timed * bench.enabled, "gate": None, "report": None}


def judged(recipe: Recipe) -> float:
    """The share of the calibration windows that a search judges by, not fits to."""
    most = 0.5 if recipe.recover.method == "refit" else 1.0
    return min(most, recipe.prune.search.windows / recipe.calibration.windows)


def roofline(arch: Architecture, value: int, batch: int, context: int, flops: float,
             bandwidth: float) -> dict[str, float]:
    """Lower bounds, seconds: a prefill of `batch` prompts of `context` tokens, and one decode step
    after it. All weights are read once, and K and V in a decode step."""
    work = {"prefill": cost.flops(arch, context), "decode": cost.flops(arch, 1, context)}
    moved = {"prefill": cost.read_per_step(arch, value, batch, 0),
             "decode": cost.read_per_step(arch, value, batch, context)}
    return {phase: max(batch * (spent.whole(arch.blocks) + cost.head_flops(arch, 1)) / flops,
                       moved[phase] / bandwidth) for phase, spent in work.items()}


def stages(s: Sizes, rates: Mapping[str, float]) -> dict[str, Stage]:
    """All three estimates of every stage; `rates`: those that `seconds` takes."""
    written, held, taken = writes(s), memory(s), seconds(s, **rates)
    return {name: Stage(written[name], held[name], taken[name]) for name in written}


def space(needed: Mapping[str, float], due: Sequence[str], folder: Path) -> tuple[float, int]:
    """The most bytes that the stages `due` need at once beyond what lies in `folder`, and the
    bytes that are free there. An earlier result stays until its stage is done."""
    growth = most = 0.0
    for name in due:
        growth += needed[name]
        most = max(most, growth)
        growth -= sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return most, shutil.disk_usage(existing).free


def require_space(resolved: Resolved, widths: Sequence[BlockWidths], due: Sequence[str],
                  folder: Path, option: str = "--runs") -> None:
    """Raise StageError where what the stages `due` write, at these widths, does not fit.
    `option`: what gives another folder."""
    pruned = replace(resolved.architecture, blocks=tuple(widths))
    needed, free = space(writes(sizes(resolved, pruned)), due, folder)
    if needed > free:
        raise StageError(f"about {needed / 1e9:.3g} GB will be written to {folder}, and "
                         f"{free / 1e9:.3g} GB are free there; free some space, or give another "
                         f"folder with {option}")

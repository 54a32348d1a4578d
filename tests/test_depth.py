"""Depth: the parts with the least influence leave, and count towards the ratio."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.pipeline import pipeline
from bipdeploy.pipeline.preflight import refuse
from bipdeploy.planning.resolved import resolved_at
from bipdeploy.pruning.allocation import allocate, uniform_widths
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.pruning.depth import Influence, dropped
from bipdeploy.pruning.divisibility import faults
from bipdeploy.pruning.kept import BlockScores, Kept
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.running import artifacts
from bipdeploy.stages.score import read_influence, score_blocks
from tests.sliced import (
    architecture_of,
    loaded,
    logits,
    masked_model,
    short_calibration,
    token_windows,
)
from tests.test_allocation import ARCHITECTURES, PARALLEL, all_parameters, draw_scores, removed
from tests.test_criteria import recipe, walk, windows
from tests.tiny import tiny_model

COUNTS = [{"blocks": 1}, {"attention": 2}, {"ffn": 1}, {"blocks": 1, "attention": 1},
          {"attention": 1, "ffn": 1}]
# Distinct, and in another order for every part: blocks 2, 0, …; attentions 1, 3, …; FFNs 3, 1, ….
INFLUENCE = [Influence(0.4, 0.5, 0.2), Influence(0.1, 0.2, 0.5), Influence(0.3, 0.3, 0.1),
             Influence(0.2, 0.1, 0.4)]


def section(ratio: float, layers: str = "uniform", *, first: int = 0, widths: bool = True,
            round_to: int = 8, **depth: int) -> PruneSection:
    return PruneSection.model_validate({
        "ratio": ratio, "layers": layers, "round_to": round_to, "depth": depth,
        "heads": widths, "ffn": widths, "protect": {"first": first}})


def draw_influence(arch: Architecture) -> list[Influence]:
    draw = torch.rand(len(arch.blocks), 3, generator=torch.Generator().manual_seed(2))
    return [Influence(*row) for row in draw.tolist()]


# Influence

@torch.no_grad()
def test_influence_is_one_minus_the_mean_cosine_of_input_and_output(variant):
    found = score_blocks(walk(variant), windows(), recipe(variant, "random")).influence
    whole, caught = loaded(variant), []

    def catch(_, inputs, output=None):
        caught.append((inputs[0] if inputs else output).double())

    for layer in whole.model.layers:
        layer.input_layernorm.register_forward_pre_hook(catch)
        layer.post_attention_layernorm.register_forward_pre_hook(catch)
    whole.model.norm.register_forward_pre_hook(catch)
    whole(torch.cat(windows()))
    cosine = torch.nn.functional.cosine_similarity
    for index, own in enumerate(found):
        x, u, y = caught[2 * index:2 * index + 3]
        expected = [1 - float(cosine(a, b, dim=-1).mean()) for a, b in ((x, u), (u, y), (x, y))]
        assert own.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_influence_does_not_depend_on_the_criterion(tiny, criterion):
    one, other = (score_blocks(walk(tiny), windows(), recipe(tiny, name)).influence
                  for name in (criterion, "magnitude"))
    assert [a.tolist() for a in one] == [b.tolist() for b in other]


# What is dropped

@pytest.mark.parametrize(("depth", "attention", "ffn"), [
    ({"blocks": 2}, [0, 2], [0, 2]),
    ({"attention": 2}, [1, 3], []),
    ({"ffn": 1}, [], [3]),
    ({"blocks": 1, "attention": 2, "ffn": 1}, [1, 2, 3], [2, 3]),
    ({"first": 3, "ffn": 1}, [], [3]),
    ({"first": 1, "blocks": 2}, [2, 3], [2, 3])])
def test_the_least_influential_unprotected_parts_are_dropped(depth, attention, ffn):
    arch = ARCHITECTURES["many-heads"]
    cut = dropped(arch, section(0.9, **depth), INFLUENCE)
    assert [i for i, b in enumerate(cut.blocks) if not b.kv_heads] == attention
    assert [i for i, b in enumerate(cut.blocks) if not b.intermediate] == ffn
    for dense, own in zip(arch.blocks, cut.blocks, strict=True):
        assert own.heads in (0, dense.heads) and own.intermediate in (0, dense.intermediate)


@pytest.mark.parametrize("layers", ["uniform", "global", "adaptive"])
@pytest.mark.parametrize("name", ["pico", "many-blocks", "biases", "already-pruned"])
def test_what_is_dropped_counts_towards_the_ratio(name, layers):
    arch, met = ARCHITECTURES[name], 0
    unit = 8 * arch.channel_parameters() * (len(arch.blocks) if layers == "uniform" else 1)
    for ratio, counts in itertools.product((0.2, 0.3, 0.5, 0.7), COUNTS):
        asked = section(ratio, layers, **counts)
        try:
            widths, kept = allocate(arch, asked, draw_scores(arch), comparable=True,
                                    influence=draw_influence(arch))
        except InputError as error:
            assert str(error).startswith(("prune.depth", "prune.ratio"))
            continue
        met += 1
        assert abs(removed(arch, widths) - ratio * all_parameters(arch)) <= unit, asked
        cut = dropped(arch, asked, draw_influence(arch))
        for own, left, choice in zip(widths, cut.blocks, kept, strict=True):
            assert bool(own.kv_heads) == bool(left.kv_heads)
            assert bool(own.intermediate) == bool(left.intermediate)
            assert (len(choice.groups), len(choice.channels)) == (own.kv_heads, own.intermediate)
    assert met >= 8


@pytest.mark.parametrize("layers", ["uniform", "global", "adaptive"])
@pytest.mark.parametrize("parallel", [2, 4])
def test_what_is_left_divides_for_tensor_parallelism(layers, parallel):
    arch = PARALLEL["gqa"]
    for ratio in (0.4, 0.6):
        widths, _ = allocate(arch, section(ratio, layers, attention=1, ffn=1), draw_scores(arch),
                             comparable=True, influence=INFLUENCE, tensor_parallel=parallel)
        assert faults(widths, parallel) == []
        assert sum(not w.kv_heads for w in widths) == sum(not w.intermediate for w in widths) == 1


def test_the_sizes_are_known_before_scoring():
    """Which parts leave is not, but their number is, and all blocks of a dense model are alike."""
    arch = ARCHITECTURES["pico"]
    for counts in COUNTS:
        asked = section(0.5, **counts)
        guessed = uniform_widths(arch, asked)
        exact = uniform_widths(arch, asked, influence=draw_influence(arch))
        assert removed(arch, guessed) == removed(arch, exact)
        for field in ("kv_heads", "intermediate"):
            assert sorted(getattr(w, field) for w in guessed) == sorted(
                getattr(w, field) for w in exact)


def test_depth_alone_meets_the_ratio_to_within_one_part():
    arch = ARCHITECTURES["many-blocks"]
    for count in range(1, 20):
        share = count / 24
        for ratio in (share - 0.03, share, share + 0.03):
            widths, _ = allocate(arch, section(ratio, widths=False, blocks=count),
                                 draw_scores(arch), comparable=True,
                                 influence=draw_influence(arch))
            assert sum(w == BlockWidths(0, 0, 0) for w in widths) == count
            assert {w for w in widths if w.heads} == {arch.blocks[0]}


@pytest.mark.parametrize(("asked", "words"), [
    (section(0.2, blocks=1), r"prune\.depth drops 0\.25 of the parameters, and prune\.ratio is 0\.2"
                             r": nothing is left for heads and channels to give; lower depth"),
    (section(0.25, blocks=1), "nothing is left"),
    (section(0.6, widths=False, blocks=1), "depth alone has to meet.*or set ratio to 0.25"),
    (section(0.9, blocks=5), r"prune\.depth\.blocks: 5 are to be dropped, and unprotected blocks "
                             "have 4 left; lower it"),
    (section(0.9, blocks=2, attention=3), r"prune\.depth\.attention: 3 .* have 2 left"),
    (section(0.9, ffn=3, first=2), r"prune\.depth\.ffn: 3 .* have 2 left"),
    (section(0.9, attention=4), "no attention of the model would be left"),
    (section(0.9, ffn=4), "no FFN of the model would be left"),
    (section(0.99, blocks=1), r"prune\.ratio: 0\.99 .* at most 0\.9\d* can be removed")])
def test_what_depth_cannot_do_is_one_clear_line(asked, words):
    with pytest.raises(InputError, match=words) as caught:
        uniform_widths(ARCHITECTURES["many-heads"], asked)
    assert "\n" not in str(caught.value)


def test_neither_widths_nor_depth_is_refused():
    minimal = {"name": "x", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3}}
    off = ["prune.heads=false", "prune.ffn=false"]
    with pytest.raises(RecipeError, match="heads and ffn are both false and depth drops nothing"):
        recipe_file.build(minimal, "--set", off)
    assert recipe_file.build(minimal, "--set", [*off, "prune.depth.blocks=2"]).prune.depth.any


# Whole runs

def masked_choice(arch: Architecture, blocks: list[dict]) -> list[Kept]:
    return [Kept(tuple(b["kept_groups"]), tuple(b["kept_channels"])) for b in blocks]


@pytest.mark.parametrize(("counts", "width"), [
    ({"blocks": 1}, False), ({"attention": 2}, True), ({"blocks": 1, "ffn": 1}, True),
    ({"attention": 1, "ffn": 1}, False)])
def test_a_depth_pruned_model_equals_the_masked_dense_one(variant, tmp_path, counts, width):
    arch = architecture_of(variant)
    settings = [*short_calibration(tmp_path), "prune.round_to=8", f"prune.heads={width}",
                f"prune.ffn={width}", *(f"prune.depth.{k}={n}" for k, n in counts.items())]
    scores = api.score(str(variant), tmp_path / "score", settings)
    cut = dropped(arch, section(0.99, **counts), read_influence(scores))
    gone = removed(arch, list(cut.blocks)) / all_parameters(arch)
    pruned = api.prune(str(variant), scores, tmp_path / "prune", gone + 0.15 * width, settings)
    kept = artifacts.read_json(pruned / "kept.json")
    for part, field in (("attention", "kv_heads"), ("ffn", "intermediate")):
        assert kept["dropped"][part] == [i for i, b in enumerate(cut.blocks)
                                         if not getattr(b, field)]
    ids = token_windows(2, 24)
    masked = masked_model(variant, masked_choice(arch, kept["blocks"]))
    torch.testing.assert_close(logits(loaded(pruned / "model"), ids), logits(masked, ids),
                               rtol=1e-4, atol=1e-4)
    for method in ("refit", "bias"):
        repaired = api.recover(str(variant), pruned, tmp_path / method,
                               [*settings, f"recover.method={method}"])
        assert bool(logits(loaded(repaired / "model"), ids).isfinite().all())
        assert Checkpoint(repaired / "model").config["per_layer_config"]


def test_scores_without_influence_are_refused_where_depth_needs_it(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    scores = api.score(str(tiny), tmp_path / "score", short_calibration(tmp_path))
    path = scores / "scores.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not n.endswith("influence")}
    save_file(tensors, path)
    api.prune(str(tiny), scores, tmp_path / "without", 0.3, ["prune.round_to=8"])
    with pytest.raises(InputError, match="score the model again"):
        api.prune(str(tiny), scores, tmp_path / "with", 0.6,
                  ["prune.round_to=8", "prune.depth.ffn=1"])


def asked_of(model: Path, *settings: str):
    base = {"name": "deep", "model": {"id": str(model)}, "prune": {"ratio": 0.5, "round_to": 8},
            "evaluate": {"perplexity": {"enabled": False}}}
    return recipe_file.build(base, "--set", [*settings])


def test_a_plan_says_that_what_is_dropped_depends_on_scores(tmp_path):
    model = tiny_model(tmp_path / "model", blocks=5)
    settings = [*short_calibration(tmp_path), "prune.depth={attention: 1, blocks: 1}",
                "prune.protect.first=1", "bench.torch.enabled=false"]
    asked = asked_of(model, *settings)
    shown = api.plan(asked, runs=tmp_path)
    assert (shown.known, shown.dropped) == ("budget", {"blocks": 1, "attention": 1, "ffn": 0})
    assert shown.pruned[0].heads and not shown.pruned[1].heads
    pipeline.run(asked, tmp_path, until="prune")
    made = api.plan(asked, runs=tmp_path)
    assert made.known == "run"
    assert made.figures["parameters.pruned"] == shown.figures["parameters.pruned"]
    assert sum(not w.heads for w in made.pruned) == 2


def test_preflight_refuses_depth_that_cannot_be(tmp_path):
    model = tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"prune\.depth"):
        refuse(resolved_at(asked_of(model, "prune.depth.blocks=2"), model))


def test_equal_scores_drop_the_first(tiny):
    arch = architecture_of(tiny)
    flat = [Influence(0.5, 0.5, 0.5)] * 3
    scores = [BlockScores([1.0] * w.kv_heads, [1.0] * w.intermediate) for w in arch.blocks]
    widths, _ = allocate(arch, section(0.5, blocks=1), scores, comparable=True, influence=flat)
    assert [bool(w.heads) for w in widths] == [False, True, True]

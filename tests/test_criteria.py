"""Criteria: scores equal what they are defined as, by brute force, and the bound is a bound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bipdeploy import api
from bipdeploy.model.blocks import Block, BlockWalker
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.model.formats import pruned_config
from bipdeploy.pruning.allocation import allocate
from bipdeploy.pruning.criteria.llm_bip import (
    head_bound,
    influence,
    measured_change,
    rank_correlation,
    strict_bound,
)
from bipdeploy.pruning.criteria.statistics import SILU_LIPSCHITZ, BlockView, Scores, Statistics
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.stages.score import _see, read_scores, score_blocks
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    results,
    short_calibration,
    token_windows,
    write_sliced,
)
from tests.tiny import tiny_model

TOKENS = 24
ALL_STATISTICS = frozenset({"energy", "gram", "ffn_parts", "output", "measured"})


def recipe(model: Path, criterion: str = "llm_bip", propagation: str = "bound",
           seed: int = 0) -> Recipe:
    return Recipe.model_validate({
        "name": "test", "seed": seed, "model": {"id": str(model), "device": "cpu"},
        "score": {"criterion": criterion, "propagation": propagation}, "prune": {"ratio": 0.3}})


def windows() -> list[torch.Tensor]:
    return list(token_windows(6, TOKENS).split(4))


def walk(model: Path) -> BlockWalker:
    return BlockWalker(model, ModelSection(id=str(model), device="cpu"))


def scores_of(model: Path, criterion: str = "llm_bip", propagation: str = "bound",
              seed: int = 0) -> list[Scores]:
    return score_blocks(walk(model), windows(), recipe(model, criterion, propagation, seed))[0]


def in_double(block: Block) -> Block:
    """A copy of a block that computes in float64."""
    arguments = {name: value.double() if torch.is_tensor(value) and value.is_floating_point()
                 else value for name, value in block._arguments.items()}
    cos, sin = block._arguments["position_embeddings"]
    arguments["position_embeddings"] = (cos.double(), sin.double())
    return Block(copy.deepcopy(block.layer).double(), arguments)


@torch.no_grad()
def blocks_in_double(model: Path) -> list[tuple[Block, torch.Tensor]]:
    """Every block with its input over all windows [B, T, D], both in float64."""
    walker = walk(model)
    hidden = walker.embed([torch.cat(windows())])[0]
    found = []
    for block in walker.blocks(TOKENS):
        found.append((in_double(block), hidden.double()))
        hidden = block(hidden)
    return found


@torch.no_grad()
def change_without(block: Block, x: torch.Tensor, weight: torch.Tensor,
                   columns: slice | list[int]) -> torch.Tensor:
    """How the block's output changes [B, T, D] where columns of a projection are zero."""
    before = block(x)
    kept = weight.data[:, columns].clone()
    weight.data[:, columns] = 0
    after = block(x)
    weight.data[:, columns] = kept
    return after - before


def relative(change: torch.Tensor, output: torch.Tensor) -> float:
    return float((change.square().sum() / output.square().sum()).sqrt())


def group_columns(arch: Architecture, index: int, group: int) -> slice:
    width = arch.blocks[index].group * arch.head_dim
    return slice(group * width, (group + 1) * width)


@torch.no_grad()
def test_an_ffn_score_is_the_relative_change_of_the_block_output(variant):
    scores = scores_of(variant)
    for (block, x), found in zip(blocks_in_double(variant), scores, strict=True):
        output = block(x)
        expected = [relative(change_without(block, x, block.down.weight, [k]), output)
                    for k in range(0, 96, 3)]
        torch.testing.assert_close(found.ffn[::3], torch.tensor(expected, dtype=torch.float64),
                                   rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_measured_head_score_is_the_relative_change_of_the_block_output(variant):
    arch, scores = architecture_of(variant), scores_of(variant, propagation="measured")
    for index, (block, x) in enumerate(blocks_in_double(variant)):
        output = block(x)
        expected = [relative(change_without(block, x, block.output.weight,
                                            group_columns(arch, index, group)), output)
                    for group in range(arch.blocks[index].kv_heads)]
        torch.testing.assert_close(scores[index].heads,
                                   torch.tensor(expected, dtype=torch.float64),
                                   rtol=1e-4, atol=0)


def test_propagation_does_not_touch_the_ffn_scores(variant):
    for bound, measured in zip(scores_of(variant), scores_of(variant, propagation="measured"),
                               strict=True):
        assert torch.equal(bound.ffn, measured.ffn)


def test_the_slope_of_silu_is_bounded():
    x = torch.linspace(-30, 30, 2_000_001, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.silu(x).sum().backward()
    steepest = float(x.grad.abs().max())
    assert steepest <= SILU_LIPSCHITZ < steepest + 1e-3


@torch.no_grad()
def each_head_group(model: Path) -> list[tuple[Block, torch.Tensor, torch.Tensor]]:
    """(block, u, delta) with u, delta [N, D] for the removal of each group, in float64."""
    arch, found = architecture_of(model), []
    for index, (block, x) in enumerate(blocks_in_double(model)):
        z, u = block.attention(x).z, block.attention(x).u
        for group in range(arch.blocks[index].kv_heads):
            columns = group_columns(arch, index, group)
            delta = -(z[..., columns] @ block.output.weight[:, columns].T)
            found.append((block, u.flatten(0, 1), delta.flatten(0, 1)))
    return found


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@torch.no_grad()
def test_the_strict_bound_holds_for_every_token(variant, scale):
    eps = walk(variant).config.rms_norm_eps
    for block, u, delta in each_head_group(variant):
        moved = scale * delta
        measured = (moved + block.ffn(u + moved) - block.ffn(u)).norm(dim=-1)
        bound = strict_bound(block, moved, u, eps)
        assert bool(bound.isfinite().all())
        assert bool((measured <= bound * (1 + 1e-9)).all())


@torch.no_grad()
def test_the_strict_bound_holds_where_the_input_turns_around(variant):
    """delta = -c u passes through zero, where a normalised vector moves most."""
    eps = walk(variant).config.rms_norm_eps
    for block, u, _ in each_head_group(variant):
        for factor in (0.5, 0.999, 1.0, 1.001, 2.0, 5.0):
            delta = -factor * u
            measured = (delta + block.ffn(u + delta) - block.ffn(u)).norm(dim=-1)
            assert bool((measured <= strict_bound(block, delta, u, eps) * (1 + 1e-9)).all())


@torch.no_grad()
def one_channel(folder: Path, *, gate: float, up: float, gate_bias: float,
                up_bias: float) -> Block:
    """A block in float64 whose FFN is one channel that reads and writes coordinate 0 only."""
    block, _ = blocks_in_double(tiny_model(folder, mlp_bias=True))[0]
    mlp = block.layer.mlp
    for parameter in mlp.parameters():
        parameter.zero_()
    block.layer.post_attention_layernorm.weight.fill_(1)
    mlp.gate_proj.weight[0, 0], mlp.up_proj.weight[0, 0] = gate, up
    mlp.gate_proj.bias[0], mlp.up_proj.bias[0] = gate_bias, up_bias
    mlp.down_proj.weight[0, 0] = 1
    return block


@torch.no_grad()
def test_the_strict_bound_is_reached(tmp_path):
    """The input turns around where silu is steepest: the bound is equal to the change."""
    block = one_channel(tmp_path / "model", gate=1e-3, up=0, gate_bias=2.3994, up_bias=1)
    u = torch.zeros(1, 64, dtype=torch.float64)
    u[0, 0] = 3
    delta = -2 * u
    change = float((block.ffn(u + delta) - block.ffn(u)).norm())
    bound = float(strict_bound(block, delta, u, 1e-6) - delta.norm())
    assert change <= bound < 1.001 * change


@torch.no_grad()
def test_the_strict_bound_covers_what_is_flat_to_first_order(tmp_path):
    """Gate and up are both zero before: their product has no slope, and changes all the same."""
    block = one_channel(tmp_path / "model", gate=5, up=5, gate_bias=0, up_bias=0)
    u, delta = torch.zeros(2, 1, 64, dtype=torch.float64)
    u[0, 1], delta[0, 0] = 1, 2
    change = float((block.ffn(u + delta) - block.ffn(u)).norm())
    assert change > 100
    assert change <= float(strict_bound(block, delta, u, 1e-6) - delta.norm())


@torch.no_grad()
def test_the_strict_bound_vanishes_with_the_perturbation(tiny):
    eps = walk(tiny).config.rms_norm_eps
    for block, u, delta in each_head_group(tiny):
        assert not strict_bound(block, torch.zeros_like(delta), u, eps).any()
        small, smaller = (strict_bound(block, c * delta, u, eps) for c in (1e-6, 1e-7))
        torch.testing.assert_close(small, 10 * smaller, rtol=1e-4, atol=0)


@torch.no_grad()
def statistics_of(model: Path) -> list[tuple[BlockView, torch.Tensor]]:
    """Per block: a view with all statistics, and the measured rms change of each group."""
    walker, found = walk(model), []
    hidden = walker.embed(windows())
    for index, block in enumerate(walker.blocks(TOKENS)):
        widths = walker.architecture.blocks[index]
        statistics = Statistics(widths.kv_heads, ALL_STATISTICS, walker.config.rms_norm_eps)
        hidden = [_see(block, statistics, x) for x in hidden]
        view = BlockView(block, statistics, widths.kv_heads, widths.intermediate, "bound",
                         torch.Generator())
        found.append((view, (statistics["measured"] / statistics.tokens).sqrt()))
    return found


def test_the_head_bound_is_above_the_measured_change_on_tiny_models(variant):
    for view, measured in statistics_of(variant):
        assert bool((head_bound(view) >= measured).all())


def test_a_bound_score_is_the_head_bound_over_the_output(variant):
    for view, _ in statistics_of(variant):
        output_rms = (view.statistics["output_energy"] / view.statistics.tokens).sqrt()
        torch.testing.assert_close(influence(view).heads, (head_bound(view) / output_rms).double(),
                                   rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_residual_term_alone_is_exact_in_a_block_without_ffn(tiny, tmp_path):
    kept = draw_kept(architecture_of(tiny), [(2, 96), (2, 0), (2, 96)])
    folder = write_sliced(tiny, tmp_path / "sliced", kept)
    bound = scores_of(folder)[1]
    measured = scores_of(folder, propagation="measured")[1]
    assert len(bound.ffn) == 0
    torch.testing.assert_close(bound.heads, measured.heads, rtol=1e-4, atol=0)


def test_agreement_of_bound_and_measurement_is_reported(variant):
    walker = walk(variant)
    agreement = score_blocks(walker, windows(), recipe(variant, propagation="measured")).agreement
    assert [entry["block"] for entry in agreement] == list(range(len(walker)))
    for entry in agreement:
        assert -1 <= entry["rank_correlation"] <= 1
        assert 0 <= entry["measured_above_bound"] <= walker.architecture.blocks[0].kv_heads
        assert entry["mean_ratio"] > 0
    assert score_blocks(walker, windows(), recipe(variant)).agreement == []


@pytest.mark.parametrize(("a", "b", "expected"), [
    ([1.0, 2.0, 5.0], [10.0, 11.0, 30.0], 1.0),
    ([1.0, 2.0, 5.0], [3.0, 2.0, -9.0], -1.0),
    ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),
])
def test_rank_correlation_is_spearmans(a, b, expected):
    assert rank_correlation(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_rank_correlation_of_one_value_is_undefined():
    one = torch.tensor([1.0])
    assert rank_correlation(one, one) != rank_correlation(one, one)


@torch.no_grad()
def inputs_of(model: Path, name: str) -> list[torch.Tensor]:
    """Inputs [N, K] of every block's projection of that name, caught in the whole model."""
    caught: list[torch.Tensor] = []
    whole = loaded(model)
    for layer in whole.model.layers:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: caught.append(inputs[0].flatten(0, 1).double()))
    whole(torch.cat(windows()))
    return caught


def test_wanda_sp_is_its_definition(variant):
    checkpoint, arch = Checkpoint(variant), architecture_of(variant)
    inputs = zip(inputs_of(variant, "self_attn.o_proj"), inputs_of(variant, "mlp.down_proj"),
                 scores_of(variant, "wanda_sp"), strict=True)
    for index, (z, h, found) in enumerate(inputs):
        tensors = checkpoint.block(index)
        columns = (tensors["self_attn.o_proj.weight"].double().abs() * z.norm(dim=0)).sum(0)
        heads = torch.stack([columns[group_columns(arch, index, g)].sum()
                             for g in range(arch.blocks[index].kv_heads)])
        ffn = (tensors["mlp.down_proj.weight"].double().abs() * h.norm(dim=0)).sum(0)
        torch.testing.assert_close(found.heads, heads, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.ffn, ffn, rtol=1e-5, atol=0)


def test_magnitude_is_the_norm_of_all_weights_of_the_group(variant):
    checkpoint, arch = Checkpoint(variant), architecture_of(variant)
    for index, found in enumerate(scores_of(variant, "magnitude")):
        tensors = {name: t.double() for name, t in checkpoint.block(index).items()}
        for group in range(arch.blocks[index].kv_heads):
            queries = group_columns(arch, index, group)
            keys = slice(group * arch.head_dim, (group + 1) * arch.head_dim)
            coupled = torch.cat([
                tensors["self_attn.q_proj.weight"][queries].flatten(),
                tensors["self_attn.k_proj.weight"][keys].flatten(),
                tensors["self_attn.v_proj.weight"][keys].flatten(),
                tensors["self_attn.o_proj.weight"][:, queries].flatten()])
            assert float(found.heads[group]) == pytest.approx(float(coupled.norm()), rel=1e-9)
        for channel in (0, 17, 95):
            coupled = torch.cat([tensors["mlp.gate_proj.weight"][channel],
                                 tensors["mlp.up_proj.weight"][channel],
                                 tensors["mlp.down_proj.weight"][:, channel]])
            assert float(found.ffn[channel]) == pytest.approx(float(coupled.norm()), rel=1e-9)


def same(a: list[Scores], b: list[Scores]) -> bool:
    return all(torch.equal(x, y) for s, t in zip(a, b, strict=True)
               for x, y in zip(s, t, strict=True))


def test_random_scores_depend_on_the_seed_alone(tiny, tmp_path):
    first = scores_of(tiny, "random", seed=5)
    assert same(first, scores_of(tiny, "random", seed=5))
    assert same(first, scores_of(tiny_model(tmp_path / "other", seed=9), "random", seed=5))
    assert not same(first, scores_of(tiny, "random", seed=6))
    assert not torch.equal(first[0].ffn, first[1].ffn)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_other_scores_do_not_depend_on_the_seed(tiny, criterion):
    assert same(scores_of(tiny, criterion, seed=5), scores_of(tiny, criterion, seed=6))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_group(variant, criterion):
    for found, widths in zip(scores_of(variant, criterion), architecture_of(variant).blocks,
                             strict=True):
        assert (len(found.heads), len(found.ffn)) == (widths.kv_heads, widths.intermediate)
        for values in found:
            assert values.dtype == torch.float64
            assert bool(values.isfinite().all())
            assert CRITERIA[criterion].one_scale or bool((values >= 0).all())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("propagation", ["bound", "measured"])
def test_blocks_without_attention_or_ffn_are_scored(tiny, tmp_path, criterion, propagation):
    kept = draw_kept(architecture_of(tiny), [(0, 96), (2, 0), (0, 0)])
    folder = write_sliced(tiny, tmp_path / "sliced", kept)
    found = scores_of(folder, criterion, propagation)
    assert [(len(s.heads), len(s.ffn)) for s in found] == [(0, 96), (2, 0), (0, 0)]


def test_batches_do_not_change_scores(variant):
    walker, asked = walk(variant), recipe(variant, propagation="measured")
    whole = torch.cat(windows())
    together = score_blocks(walker, [whole], asked)[0]
    one_by_one = score_blocks(walker, list(whole.split(1)), asked)[0]
    for a, b in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def shuffled(source: Path, folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Write `source` with its KV groups and channels in another order; returns the orders."""
    dense, arch = Checkpoint(source), architecture_of(source)
    generator = torch.Generator().manual_seed(3)
    group_orders, channel_orders = [], []
    with CheckpointWriter(folder, dense.config, source) as writer:
        writer.add(dense.tensors(dense.outside_blocks()))
        for index, widths in enumerate(arch.blocks):
            groups = torch.randperm(widths.kv_heads, generator=generator)
            groups = groups.roll(1) if groups.tolist() == sorted(groups.tolist()) else groups
            channels = torch.randperm(widths.intermediate, generator=generator)
            orders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
            query_rows = torch.arange(widths.heads * arch.head_dim).view(
                widths.kv_heads, -1)[groups].flatten()
            kv_rows = torch.arange(widths.kv_heads * arch.head_dim).view(
                widths.kv_heads, -1)[groups].flatten()
            for part, rows in (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows),
                               ("gate_proj", channels), ("up_proj", channels)):
                orders[part] = lambda t, rows=rows: t[rows]
            orders["o_proj"] = lambda t, columns=query_rows: t[:, columns] if t.dim() > 1 else t
            orders["down_proj"] = lambda t, columns=channels: t[:, columns] if t.dim() > 1 else t
            writer.add({name: orders.get(name.split(".")[1], lambda t: t)(tensor)
                        for name, tensor in dense.block(index).items()}, f"model.layers.{index}.")
            group_orders.append(groups.tolist())
            channel_orders.append(channels.tolist())
    return group_orders, channel_orders


def pruned(source: Path, folder: Path, scores: list[Scores], layers: str, comparable: bool) -> Any:
    """The pruned model, loaded."""
    section = PruneSection.model_validate({"ratio": 0.4, "layers": layers, "round_to": 4})
    as_lists = [BlockScores(s.heads.tolist(), s.ffn.tolist()) for s in scores]
    _, kept = allocate(architecture_of(source), section, as_lists, comparable=comparable)
    return loaded(write_sliced(source, folder, kept))


@pytest.mark.parametrize(("criterion", "propagation"), [
    ("llm_bip", "measured"), *((name, "bound") for name in CRITERIA if name != "random")])
def test_a_permuted_model_is_scored_and_pruned_the_same(variant, tmp_path, criterion, propagation):
    groups, channels = shuffled(variant, tmp_path / "shuffled")
    plain = scores_of(variant, criterion, propagation)
    moved = scores_of(tmp_path / "shuffled", criterion, propagation)
    for index, (a, b) in enumerate(zip(plain, moved, strict=True)):
        # Standardised scores, and sums of terms of both signs, may be about zero.
        near = 1e-5 * float(a.ffn.abs().mean()) if criterion != "llm_bip" else 0
        torch.testing.assert_close(a.heads[groups[index]], b.heads, rtol=1e-4, atol=near)
        torch.testing.assert_close(a.ffn[channels[index]], b.ffn, rtol=1e-4, atol=near)
    ids, comparable = token_windows(2, TOKENS, seed=1), CRITERIA[criterion].comparable
    for layers in ("uniform", "global"):
        expected = logits(pruned(variant, tmp_path / f"a-{layers}", plain, layers, comparable), ids)
        found = logits(pruned(tmp_path / "shuffled", tmp_path / f"b-{layers}", moved, layers,
                              comparable), ids)
        difference = float((found - expected).abs().max())
        assert difference < 1e-5 * float(expected.abs().max())


ALL_CRITERIA = [("llm_bip", "measured"), *((name, "bound") for name in CRITERIA)]


@pytest.mark.parametrize(("criterion", "propagation"), ALL_CRITERIA)
def test_a_query_head_with_a_kv_head_of_its_own_is_scored_as_that(variant, criterion, propagation):
    for own, widths in zip(scores_of(variant, criterion, propagation),
                           architecture_of(variant).blocks, strict=True):
        assert own.queries.shape == (widths.heads,) and own.queries.dtype == torch.float64
        if widths.group == 1:
            torch.testing.assert_close(own.queries, own.heads)
        else:
            assert len(own.queries.unique()) == widths.heads


@torch.no_grad()
def as_multi_head(source: Path, folder: Path) -> Path:
    """The same function with a KV head for every query head: K and V written out for each."""
    dense, arch = Checkpoint(source), architecture_of(source)
    widths = [BlockWidths(w.heads, w.heads, w.intermediate) for w in arch.blocks]
    with CheckpointWriter(folder, pruned_config(dense.config, arch, widths), source) as writer:
        writer.add(dense.tensors(dense.outside_blocks()))
        for index, own in enumerate(arch.blocks):
            writer.add({
                name: torch.cat([part for part in tensor.split(arch.head_dim)
                                 for _ in range(own.group)])
                if name in arch.family.kv_rows else tensor
                for name, tensor in dense.block(index).items()}, f"model.layers.{index}.")
    return folder


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in (
    "magnitude", "random", "taylor", "taylor_vector")])
def test_query_heads_are_scored_as_the_heads_of_the_same_model_without_groups(
        tiny, tmp_path, criterion):
    """Criteria that look at o_proj's inputs and columns see the same in both."""
    expected = scores_of(as_multi_head(tiny, tmp_path / "mha"), criterion)
    for own, other in zip(scores_of(tiny, criterion), expected, strict=True):
        torch.testing.assert_close(own.queries, other.heads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("criterion", "power"), [("magnitude", 2), ("taylor", 1)])
def test_query_heads_share_out_the_weights_of_their_group(tiny, criterion, power):
    for own in scores_of(tiny, criterion):
        torch.testing.assert_close(own.queries.view(2, 2).pow(power).sum(1),
                                   own.heads.pow(power), rtol=1e-5, atol=0)


def test_draws_for_query_heads_leave_the_others_as_they_were(tiny):
    plain = torch.Generator().manual_seed(0)
    for own in scores_of(tiny, "random"):
        assert torch.equal(own.heads, torch.rand(2, generator=plain, dtype=torch.float64))
        assert torch.equal(own.ffn, torch.rand(96, generator=plain, dtype=torch.float64))


@pytest.mark.parametrize("layers", ["uniform", "global", "adaptive"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_criterion_gets_the_same_budget(variant, layers, ratio):
    """To one rounding unit: uniform widths are equal, others meet the ratio in other blocks."""
    arch = architecture_of(variant)
    section = PruneSection.model_validate({"ratio": ratio, "layers": layers, "round_to": 4})
    total = sum(arch.block_parameters(i) for i in range(3))
    unit = 4 * arch.channel_parameters() * (3 if layers == "uniform" else 1) / total
    found = set()
    for name, criterion in CRITERIA.items():
        scores = [BlockScores(s.heads.tolist(), s.ffn.tolist()) for s in scores_of(variant, name)]
        widths, _ = allocate(arch, section, scores, comparable=criterion.comparable,
                             one_scale=criterion.one_scale)
        removed = 1 - sum(arch.block_parameters(i, w) for i, w in enumerate(widths)) / total
        assert abs(removed - ratio) <= unit, name
        found.add(removed)
    assert len(found) == 1 or layers != "uniform"


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if not row.counts])
def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path, criterion):
    settings = [*short_calibration(tmp_path), f"score.criterion={criterion}", "seed=7"]
    found = []
    for attempt in ("one", "two"):
        scores = api.score(str(tiny), tmp_path / attempt / "score", settings)
        folder = api.prune(str(tiny), scores, tmp_path / attempt / "prune", 0.3,
                           ["prune.round_to=8", "prune.layers=global"])
        found.append((results(scores), results(folder)))
    assert found[0] == found[1]
    assert "scores.safetensors" in found[0][0]
    assert "model/model.safetensors" in found[0][1]


@torch.no_grad()
def test_measured_change_sums_over_tokens(tiny):
    block, x = blocks_in_double(tiny)[0]
    attended = block.attention(x)
    whole = measured_change(block, attended.z, attended.u, 2)
    parts = [measured_change(block, z, u, 2)
             for z, u in zip(attended.z.split(1), attended.u.split(1), strict=True)]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-4, atol=0)


def test_measured_scores_are_written_where_every_query_head_has_a_kv_head(tmp_path):
    dense = tiny_model(tmp_path / "model", kv_heads=4)
    out = api.score(str(dense), tmp_path / "scores", [
        *short_calibration(tmp_path), "score.propagation=measured"])
    assert all(own.heads == own.queries for own in read_scores(out))

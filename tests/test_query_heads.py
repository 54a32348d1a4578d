"""Query heads that leave their KV group: what is allowed, chosen, searched and written."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from bipdeploy import api
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.measuring import profile
from bipdeploy.model import cost
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import Architecture, BlockWidths, Heads, architecture
from bipdeploy.planning import latency
from bipdeploy.pruning import search
from bipdeploy.pruning.allocation import part_widths, uniform_widths
from bipdeploy.pruning.choices import ladder, possible_widths
from bipdeploy.pruning.divisibility import faults, head_choices
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.pruning.search import Curve
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe import file
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.running.artifacts import figures, read_json
from bipdeploy.stages.score import read_scores
from tests.sliced import architecture_of, loaded, logits, short_calibration, token_windows
from tests.test_allocation import all_parameters, removed, sizes
from tests.tiny import tiny_model

# Heads, KV heads and the rest as in Qwen2.5-0.5B and SmolLM2-135M; one that divides by 4 GPUs; MHA.
MODELS = {
    "two-groups-of-seven": architecture(sizes(896, 4864, 14, 2, 4, head_dim=64)),
    "three-groups-of-three": architecture(sizes(576, 1536, 9, 3, 4, head_dim=64)),
    "eight-groups-of-four": architecture(sizes(512, 1376, 32, 8, 4)),
    "no-groups": architecture(sizes(512, 1376, 8, 8, 4)),
}
GROUPED = [name for name in MODELS if name != "no-groups"]


def section(ratio: float, heads: str, **more) -> PruneSection:
    return PruneSection.model_validate({"ratio": ratio, "heads": heads, "round_to": 8, **more})


@pytest.fixture
def grouped(tmp_path):
    """Two KV heads of three query heads each."""
    return tiny_model(tmp_path / "model", heads=6, hidden_size=96)


def test_scores_are_written_where_query_heads_are_kv_heads(tmp_path):
    """Heads that are measured and those of single queries are one tensor then."""
    model = tiny_model(tmp_path / "model", heads=2, kv_heads=2)
    for propagation in ("bound", "measured"):
        scores = api.score(str(model), tmp_path / propagation, [
            *short_calibration(tmp_path), f"score.propagation={propagation}"])
        assert all(list(own.heads) == list(own.queries) for own in read_scores(scores))


# What is allowed

@pytest.mark.parametrize(("leaving", "expected"), [
    ("kv", [(0, 0), (1, 3), (2, 3)]), ("query", [(0, 0), (2, 1), (2, 2), (2, 3)]),
    ("both", [(0, 0), (1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (2, 3)])])
def test_what_may_stay_of_an_attention(leaving, expected):
    assert head_choices(BlockWidths(6, 2, 8), 1, leaving) == expected


@pytest.mark.parametrize("leaving", ["kv", "query", "both"])
@pytest.mark.parametrize("parallel", [1, 2, 4, 8])
def test_what_may_stay_divides_and_the_first_is_the_least(leaving, parallel):
    dense = MODELS["eight-groups-of-four"].blocks[0]
    _, *found = head_choices(dense, parallel, leaving)
    assert faults([BlockWidths(h.total, h.kv, 0) for h in found], parallel) == []
    assert found[-1] == dense.attention
    assert all(found[0].kv <= h.kv and found[0].total <= h.total for h in found)


def test_a_ladder_ascends_and_prefers_query_heads_where_two_weigh_the_same():
    arch = MODELS["eight-groups-of-four"]
    found = ladder(arch, 0, head_choices(arch.blocks[0], 1, "both"))
    weights = [arch.kv_group_parameters(0, h.queries) * h.kv for h in found.values()]
    assert weights == sorted(set(weights))
    everything = product(range(1, 9), range(1, 5))
    assert set(weights[1:]) == {arch.kv_group_parameters(0, q) * k for k, q in everything}
    assert found[2 * 3 / 5] == Heads(2, 2)  # which weigh as much as three of one query head
    assert found[8.0] == Heads(8, 4)


@pytest.mark.parametrize("leaving", ["kv", "query", "both"])
def test_where_every_query_head_has_its_own_kv_head_they_leave_together(leaving):
    dense = BlockWidths(8, 8, 64)
    assert head_choices(dense, 1, leaving) == [Heads(0, 0), *(Heads(n, 1) for n in range(1, 9))]


# Uniform widths

@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("leaving", ["query", "both"])
@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.2, 0.3, 0.4, 0.5])
def test_uniform_widths_meet_the_ratio_with_regular_groups(name, leaving, ratio):
    arch = MODELS[name]
    found = uniform_widths(arch, section(ratio, leaving))
    assert len(set(found)) == 1
    miss = removed(arch, found) - ratio * all_parameters(arch)
    assert abs(miss) <= 8 * arch.channel_parameters() * len(arch.blocks)
    own, dense = found[0], arch.blocks[0]
    assert own.heads == own.kv_heads * own.group and 1 <= own.group <= dense.group
    assert own.kv_heads == dense.kv_heads or leaving == "both"


def attention_share(arch: Architecture, widths: BlockWidths) -> float:
    """Of the attention's parameters, how many stay."""
    dense = arch.blocks[0]
    return (arch.kv_group_parameters(0, widths.group) * widths.kv_heads
            / (arch.kv_group_parameters(0) * dense.kv_heads))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("ratio", [0.15, 0.25, 0.35])
def test_both_come_nearer_to_the_share_asked_of_the_attention(name, ratio):
    arch = MODELS[name]
    misses = {leaving: abs(attention_share(arch, uniform_widths(
        arch, section(ratio, leaving))[0]) - (1 - ratio)) for leaving in ("kv", "both")}
    assert misses["both"] <= misses["kv"] and misses["both"] < 0.11


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_without_groups_query_heads_change_nothing(ratio):
    arch = MODELS["no-groups"]
    both, kv = (uniform_widths(arch, section(ratio, leaving)) for leaving in ("both", "kv"))
    assert both == kv


@pytest.mark.parametrize("leaving", ["query", "both"])
@pytest.mark.parametrize("parallel", [2, 4])
def test_uniform_widths_divide(leaving, parallel):
    arch = MODELS["eight-groups-of-four"]
    asked = section(0.35, leaving)
    assert faults(uniform_widths(arch, asked, tensor_parallel=parallel), parallel) == []
    assert faults(possible_widths(arch, asked, tensor_parallel=parallel), parallel) == []
    choices = part_widths(arch, asked, tensor_parallel=parallel)(0, "heads")
    assert faults([arch.blocks[0].having(own) for own in choices], parallel) == []


def test_a_ratio_out_of_reach_is_refused_with_what_query_heads_allow():
    arch = MODELS["two-groups-of-seven"]
    with pytest.raises(InputError, match="each keeps 2 KV heads and 8 channels"):
        uniform_widths(arch, section(0.99, "query"))
    least = arch.block_parameters(0, BlockWidths(2, 2, 8)) / arch.block_parameters(0)
    most = int((1 - least) * 1000) / 1000
    assert uniform_widths(arch, section(most, "query"))[0] == BlockWidths(2, 2, 8)


def test_each_group_keeps_its_own_best_query_heads():
    scores = BlockScores([1.0, 3.0, 2.0], [0.0] * 4, [5, 1, 9, 0, 7, 7, 2, 3, 1])
    assert keep(scores, BlockWidths(4, 2, 4)) == Kept((1, 2), (0, 1, 2, 3), ((1, 2), (0, 1)))
    assert keep(scores, BlockWidths(3, 3, 4)).queries == ((2,), (1,), (1,))
    assert keep(scores, BlockWidths(6, 2, 4)).queries == ()
    assert keep(scores, BlockWidths(0, 0, 4)) == Kept((), (0, 1, 2, 3))
    assert keep(scores, BlockWidths(4, 2, 4)).query_heads(3) == (4, 5, 6, 7)


# Search

def test_a_curve_of_heads_keeps_what_was_measured_and_never_falls_with_either_number():
    measured = {Heads(1, 1): 0.9, Heads(1, 7): 0.5, Heads(2, 2): 0.4, Heads(2, 5): 0.1,
                Heads(2, 7): 0.0}
    curve = Curve(0, "heads", list(measured), list(measured.values()))
    assert {own: curve.at(own) for own in measured} == measured
    pairs = [Heads(k, q) for k, q in product((1, 2), range(1, 8))]
    for small, large in product(pairs, repeat=2):
        if small.kv <= large.kv and small.queries <= large.queries:
            assert curve.at(small) >= curve.at(large)
    assert curve.at(Heads(2, 6)) == pytest.approx(0.05)  # half way from 10 query heads to 14
    assert 0.4 < curve.at(Heads(2, 1)) < 0.9


def test_a_curve_of_whole_groups_is_the_line_that_it_was():
    groups = Curve(0, "heads", [Heads(k, 4) for k in (1, 3, 8)], [0.7, 0.3, 0.0])
    counts = Curve(0, "ffn", [1, 3, 8], [0.7, 0.3, 0.0])
    assert [groups.at(Heads(k, 4)) for k in range(1, 9)] == [counts.at(k) for k in range(1, 9)]


def test_curves_are_read_with_pairs_and_as_they_were_written_before():
    arch = MODELS["two-groups-of-seven"]
    record = {"block": 0, "part": "heads", "widths": [1, 2], "divergences": [0.2, 0.0]}
    assert Curve.read(record, arch).widths == [Heads(1, 7), Heads(2, 7)]
    assert Curve.read({**record, "widths": [[1, 3], [2, 7]]}, arch).widths == [
        Heads(1, 3), Heads(2, 7)]
    assert Curve.read({**record, "part": "ffn"}, arch).widths == [1, 2]


@pytest.mark.parametrize("name", ["parameters", "flops", "memory"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_solver_finds_the_best_pairs(grouped, name, share):
    arch = architecture_of(grouped)
    spent = {"parameters": cost.parameters(arch), "flops": cost.flops(arch, 200),
             "memory": cost.memory(arch, 2, 4000)}[name]
    draw = torch.Generator().manual_seed(int(share * 100))
    _, *heads = head_choices(arch.blocks[0], 1, "both")
    choices = {"heads": heads, "ffn": [48, 96]}
    curves = [Curve(block, part, list(widths), sorted(
        torch.rand(len(widths), generator=draw).tolist(), reverse=True))
        for block in range(3) for part, widths in choices.items()]
    options = [BlockWidths(h.total, h.kv, f) for h, f in product(*choices.values())]
    everything = list(product(options, repeat=3))
    least = min(map(spent.whole, everything))
    budget = least + share * (spent.whole(arch.blocks) - least)
    found = search.solve_within(arch, curves, lambda _, part: choices[part], budget, spent)
    assert spent.whole(found) <= budget
    best = min(search.predicted(curves, w) for w in everything if spent.whole(w) <= budget * 0.998)
    assert search.predicted(curves, found) <= best + 1e-9


# Times

def test_times_of_fewer_query_heads_are_measured_where_they_may_leave():
    dense = BlockWidths(14, 2, 4864)
    assert not any(name.startswith("queries") for name in profile._variants(dense))
    found = profile._variants(dense, queries=True)
    assert found["queries 1"] == BlockWidths(2, 2, 4864)
    times = {name: [w.intermediate * 1e-6 + (w.heads + w.kv_heads) * 1e-3 + 0.01] * 4
             for name, w in found.items()}
    phase = profile.summarise(times, found, 1)
    assert phase.queries is not None and phase.queries.widths[-1] == 7
    for heads in (Heads(2, 7), Heads(1, 7), Heads(2, 1), Heads(2, 3), Heads(1, 2)):
        spent = phase.cost.part(0, "heads", heads)
        assert spent == pytest.approx((heads.total + heads.kv) * 1e-3)
    assert phase.cost.part(0, "heads", Heads(0, 0)) == 0
    plain = profile.summarise({n: t for n, t in times.items() if "queries" not in n}, found, 1)
    assert plain.queries is None and plain.cost.part(0, "ffn", 100) == pytest.approx(1e-4)


def test_tables_with_query_heads_have_a_key_of_their_own_and_survive_the_cache(tmp_path):
    arch, model = MODELS["two-groups-of-seven"], built().model
    plain, asked = (latency.key({}, arch, model, 1, 16, own) for own in (False, True))
    assert asked == {**plain, "queries": True}
    phase = latency.Phase(latency.Curve((1, 2), (1.0, 2.0)), latency.Curve((8,), (1.0,)), 0.5, {},
                          {}, latency.Curve((1, 7), (0.5, 2.0)))
    table = latency.Table(asked, {"decode": phase}, 2, 9, 1.0, {"a": 1})
    latency.store(table, tmp_path)
    assert latency.lookup(asked, tmp_path) == table
    assert latency.lookup(plain, tmp_path) is None


# The stages

def kept_of(record: dict) -> list[Kept]:
    return [Kept(tuple(b["kept_groups"]), tuple(b["kept_channels"]),
                 tuple(map(tuple, b.get("kept_queries", ())))) for b in record["blocks"]]


@pytest.mark.parametrize(("heads", "more"), [
    ("query", []), ("both", []), ("both", ["prune.layers=searched"]),
    ("query", ["prune.layers=searched", "prune.search.propagation=measured"]),
    ("both", ["prune.layers=searched", "prune.search.rounds=2"]),
    ("both", ["recover.method=bias"])])
def test_a_model_is_scored_pruned_and_repaired(grouped, tmp_path, heads, more):
    settings = [*short_calibration(tmp_path), "prune.round_to=8", f"prune.heads={heads}",
                "prune.search.points=4", *more]
    scores = api.score(str(grouped), tmp_path / "scores", settings)
    pruned = api.prune(str(grouped), scores, tmp_path / "pruned", 0.35, settings)
    arch, made = architecture_of(grouped), Checkpoint(pruned / "model")
    assert figures([pruned])["block_parameters.ratio"] == pytest.approx(0.65, abs=0.02)
    record = read_json(pruned / "kept.json")
    assert any("kept_queries" in block for block in record["blocks"])
    blocks = made.architecture.blocks
    for index, (kept, own) in enumerate(zip(kept_of(record), blocks, strict=True)):
        assert own.heads == own.kv_heads * own.group == len(kept.query_heads(3))
        assert own.kv_heads == 2 or heads == "both"
        expected = slice_block(Checkpoint(grouped).block(index), arch, index, kept)
        for name, tensor in made.block(index).items():
            assert torch.equal(tensor, expected[name]), name
    repaired = api.recover(str(grouped), pruned, tmp_path / "repaired", settings)
    errors = read_json(repaired / "recover.json")["blocks"]
    assert sum(own["error_after"] for own in errors) < sum(own["error_before"] for own in errors)
    assert architecture_of(repaired / "model").blocks == blocks
    assert logits(loaded(repaired / "model"), token_windows(1, 8)).isfinite().all()


@pytest.mark.parametrize(("heads", "ratio"), [("query", 0.5), ("both", 0.3)])
def test_query_heads_are_chosen_again_within_the_repair(grouped, tmp_path, heads, ratio):
    """At the same widths; the repaired model has the heads that are recorded."""
    settings = [*short_calibration(tmp_path), "prune.round_to=8", f"prune.heads={heads}",
                "score.criterion=random"]
    scores = api.score(str(grouped), tmp_path / "scores", settings)
    pruned = api.prune(str(grouped), scores, tmp_path / "pruned", ratio, settings)
    plain = api.recover(str(grouped), pruned, tmp_path / "plain", settings)
    again = api.recover(str(grouped), pruned, tmp_path / "again",
                        [*settings, "recover.refit.reselect=true"])
    made, dense, arch = (Checkpoint(again / "model"), Checkpoint(grouped), architecture_of(grouped))
    assert made.architecture.blocks == architecture_of(pruned / "model").blocks
    before = kept_of(read_json(pruned / "kept.json"))
    records = read_json(again / "recover.json")["blocks"]
    for index, own in enumerate(records):
        kept = Kept(tuple(own["groups"]), tuple(own["channels"]), tuple(map(tuple, own["queries"])))
        expected = slice_block(dense.block(index), arch, index, kept)
        for name, tensor in made.block(index).items():
            if "o_proj.weight" not in name and "down_proj.weight" not in name:
                assert torch.equal(tensor, expected[name]), name
        own["differs"] = kept.query_heads(3) != before[index].query_heads(3)
    assert any(own["differs"] for own in records)
    first, second = (sum(own["error_after"] for own in read_json(folder / "recover.json")["blocks"])
                     for folder in (plain, again))
    assert second < first


def test_scores_from_before_serve_whole_groups_and_are_refused_for_query_heads(grouped, tmp_path):
    settings = [*short_calibration(tmp_path), "prune.round_to=8"]
    scores = api.score(str(grouped), tmp_path / "scores", settings)
    path = scores / "scores.safetensors"
    plain = api.prune(str(grouped), scores, tmp_path / "plain", 0.35, settings)
    save_file({name: tensor for name, tensor in load_file(path).items()
               if not name.endswith(".queries")}, path)
    again = api.prune(str(grouped), scores, tmp_path / "again", 0.35, settings)
    assert (again / "kept.json").read_bytes() == (plain / "kept.json").read_bytes()
    with pytest.raises(InputError, match=r"^prune\.heads: both needs .* score the model again"):
        api.prune(str(grouped), scores, tmp_path / "refused", 0.35,
                  [*settings, "prune.heads=both"])


# The recipe

def built(*settings: str):
    return file.build({"name": "x", "model": {"id": "y"}, "prune": {"ratio": 0.3}}, "here",
                      list(settings))


@pytest.mark.parametrize(("written", "read"), [
    ("true", "kv"), ("false", False), ("kv", "kv"), ("query", "query"), ("both", "both")])
def test_what_leaves_is_read_as_a_word_or_as_it_was_before(written, read):
    assert built(f"prune.heads={written}").prune.heads == read
    assert built().prune.heads == "kv"


@pytest.mark.parametrize(("settings", "fault"), [
    (["prune.heads=some"], "prune.heads: 'some' is none of kv, query, both, true and false"),
    (["prune.heads=1"], "prune.heads: 1 is none of"),
    (["prune.heads=both", "prune.layers=global"], "layers: global ranks whole KV heads"),
    (["prune.heads=query", "prune.layers=adaptive"], "layers: adaptive ranks whole KV heads")])
def test_what_is_not_for_query_heads_is_refused_in_a_line(settings, fault):
    with pytest.raises(RecipeError, match=fault.replace(".", r"\.")) as caught:
        built(*settings)
    assert str(caught.value).count("\n") == 1
